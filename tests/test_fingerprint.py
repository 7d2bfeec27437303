from tokenwise import fingerprint


def test_content_counts_and_the_place_does_not(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "saved").mkdir(parents=True)
        (tmp_path / folder / f"{folder}.txt").write_text("same")
        (tmp_path / folder / "saved" / "state.json").write_text("{}")
    one, two = ([tmp_path / name / f"{name}.txt", tmp_path / name / "saved"] for name in ("one", "two"))
    assert fingerprint.of_data(one) == fingerprint.of_data(two)
    assert fingerprint.of_data(one) != fingerprint.of_data(one[::-1])
    (tmp_path / "two" / "saved" / "state.json").write_text("{ }")
    assert fingerprint.of_data(one) != fingerprint.of_data(two)
    renamed = one[0].with_suffix(".py")
    one[0].rename(renamed)
    assert fingerprint.of_data([renamed]) != fingerprint.of_data(two[:1])


def test_a_model_is_its_weights_and_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    model, tokenizer = fingerprint.of_model(tmp_path), fingerprint.of_tokenizer(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert fingerprint.of_model(tmp_path) == model
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert fingerprint.of_model(tmp_path) != model
    assert fingerprint.of_tokenizer(tmp_path) == tokenizer


def test_values_are_compared_whatever_their_order():
    assert fingerprint.of_value({"a": 1, "b": [2]}) == fingerprint.of_value({"b": [2], "a": 1})
    assert fingerprint.of_value([1, 2]) != fingerprint.of_value([2, 1])


def test_versions_name_the_packages_that_decide_a_result():
    assert set(fingerprint.versions()) == {"tokenwise", "torch", "transformers", "tokenizers"}
