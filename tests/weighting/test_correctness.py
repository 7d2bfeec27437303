import json

from correctness import FILE, verdicts


def test_every_method_gives_the_exact_update_in_every_layout_and_the_documented_table_says_so(tmp_path):
    found = verdicts(tmp_path)
    wrong = [f"{name}: {layout}" for name, row in found.items() for layout, cell in row.items() if cell == "NO"]
    assert not wrong
    assert found == json.loads(FILE.read_text(encoding="utf-8")), "run python tests/weighting/correctness.py"
