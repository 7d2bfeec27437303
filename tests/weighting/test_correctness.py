import json

from correctness import FILE, cases, verdicts

from tokenwise import catalog


def documented():
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_every_method_gives_the_exact_update_in_every_layout_and_the_documented_tables_say_so(tmp_path):
    found = verdicts(tmp_path)
    rows = {name: row for table in found.values() for name, row in table.items()}
    assert not [f"{name}: {layout}" for name, row in rows.items() for layout, cell in row.items() if cell == "NO"]
    assert found == documented(), "run python tests/weighting/correctness.py"


def test_every_weighting_method_of_the_catalog_has_a_row():
    expected = {name: case.group for name, case in cases("unread").items()}
    assert {name: group for group, table in documented().items() for name in table} == expected
    methods = {entry["name"] for entry in catalog.entries().values() if entry["family"] == "weighting"}
    assert {name.split(",")[0] for name in expected} == methods
