import json

import numpy as np
import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from tokenwise import files
from tokenwise.comparison import data
from tokenwise.documents import find_files, read_documents
from tokenwise.errors import InputError
from tokenwise.models import load

TEXT = [f"def f{i}(x):\n    return x + {i}\n" for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer():
    return load.train_tokenizer(TEXT, 280)


@pytest.fixture(scope="module")
def bare(tokenizer):
    """The same tokenizer with neither BOS nor EOS."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)


def message(function, *arguments, **options):
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# Finding files


def test_paths_lists_and_globs_are_found_from_the_folder(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def found(patterns):
        return [path.relative_to(tmp_path).as_posix() for path in find_files(patterns, tmp_path)]

    assert found("a.txt") == ["a.txt"]
    assert found(["b.txt", "a.txt"]) == ["b.txt", "a.txt"]
    assert found("*.txt") == ["a.txt", "b.txt"]
    assert found("**/*.*") == ["a.txt", "b.txt", "deep/c.py"]
    assert found(str(tmp_path / "deep" / "*")) == ["deep/c.py"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path):
    (tmp_path / "part[1].txt").write_text("x")
    assert find_files("part[1].txt", tmp_path) == [tmp_path / "part[1].txt"]


def test_every_file_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "train.txt").write_text("x")
    (tmp_path / "image.png").write_text("x")
    DatasetDict({"train": Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "splits")
    said = message(find_files, ["trian.txt", "*.md", "image.png", ".", "splits", 3], tmp_path, "task.data.train")
    lines = said.splitlines()
    assert lines[0].startswith("task.data.train[0]:")
    assert "train.txt" in lines[0].split("Did you mean")[1]
    assert "no file matches" in lines[1]
    assert "cannot be read (.png)" in lines[2]
    assert "not one that datasets' save_to_disk made" in lines[3]
    assert "holds the splits train." in lines[4]
    assert lines[4].endswith("splits/train'.")
    assert "3 is not a path" in lines[5]
    assert "names no file" in message(find_files, [], tmp_path)


# Reading documents


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    texts = ["first\nline", "zweiter Satz: größer", "third"]
    records = [{"id": index, "text": text} for index, text in enumerate(texts)]
    write_lines(tmp_path / "lines.jsonl", *records)
    write_lines(tmp_path / "lines.json", *records)
    (tmp_path / "list.json").write_text(json.dumps(records, indent=1))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "table.parquet")
    Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    for name in ("lines.jsonl", "lines.json", "list.json", "table.parquet", "saved"):
        assert read_documents(find_files(name, tmp_path)) == texts, name
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.md").write_text(text, encoding="utf-8")
    assert read_documents(find_files("*.md", tmp_path)) == texts


def test_another_field_can_hold_the_text(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"question": "why"})
    assert read_documents([path], "question") == ["why"]


def test_documents_without_text_are_left_out_and_counted(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", {"text": "a"}, {"text": ""}, {"text": " \n"}, {"text": None}, {"text": "b"}
    )
    documents = read_documents([path])
    assert documents == ["a", "b"]
    assert documents.empty == 3


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3 is not JSON"),
        ("a.jsonl", '{"txt": "a", "id": 1}\n', "line 1 has no field 'text'; it has txt, id. Did you mean 'txt'?"),
        ("a.jsonl", '{"body": "a"}\n', "it has body. Name the one that holds the text."),
        ("a.jsonl", '{"text": 3}\n', "field 'text' of '{path}' line 1 holds int, not text."),
        ("a.jsonl", '["a"]\n', "line 1 holds list, not an object"),
        ("a.json", '[{"text": "a"},\n {"text" "b"}]', "line 2 is not JSON"),
        ("a.json", '[{"text": "a"}, {"body": "b"}]', "record 2 of '{path}' has no field 'text'"),
        ("a.txt", " \n", "there is no text in {path} (1 empty documents)."),
        ("a.jsonl", "", "there is no text in {path} (0 empty documents)."),
        ("a.parquet", "text", "is not a Parquet file."),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_text(content)
    said = message(read_documents, [path], field="task.data.eval")
    assert said.startswith("task.data.eval: ")
    assert expected.replace("{path}", str(path)) in said


def test_a_missing_column_is_said(tmp_path):
    parquet.write_table(pyarrow.table({"texts": ["a"]}), tmp_path / "a.parquet")
    Dataset.from_dict({"n": [1], "text_a": ["a"]}).save_to_disk(tmp_path / "saved")
    assert "it has texts. Did you mean 'texts'?" in message(read_documents, [tmp_path / "a.parquet"])
    assert "it has n, text_a." in message(read_documents, [tmp_path / "saved"])
    assert "field 'n' of" in message(read_documents, [tmp_path / "saved"], "n")


def test_all_broken_files_are_named_at_once(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    write_lines(tmp_path / "b.jsonl", {"body": "b"})
    said = message(read_documents, [tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.txt"])
    assert "not UTF-8 text (byte 3)" in said
    assert "b.jsonl" in said
    assert "c.txt' cannot be read: No such file" in said


# Token ids


def test_blocks_are_the_joined_documents(tokenizer):
    eos = tokenizer.eos_token_id
    stream = [eos] + [token for text in TEXT for token in [*tokenizer(text)["input_ids"], eos]]
    blocks = data.token_blocks(TEXT, tokenizer, 16)
    assert blocks.dtype == np.int32
    assert blocks.shape == (len(stream) // 16, 16)
    assert blocks.ravel().tolist() == stream[: blocks.size]


def test_too_little_text_for_a_batch_is_said(tokenizer):
    tokens = len(tokenizer("short")["input_ids"]) + 2
    said = message(data.token_blocks, ["short"], tokenizer, 64, at_least=8, field="task.data.train")
    assert said.startswith(f"task.data.train: too short: {tokens} tokens, and 512 are needed")
    assert "batch of 8 sequences of 64 tokens" in said


def test_the_joint_follows_the_tokenizer(tokenizer, bare):
    assert data.joint_ids(tokenizer) == [tokenizer.eos_token_id]
    assert data.joint_ids(bare) == []
    backend = tokenizer.backend_tokenizer
    only_bos = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|padding|>")
    assert data.joint_ids(only_bos) == [only_bos.bos_token_id]
    unused_bos = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|padding|>", eos_token="<|endoftext|>")
    assert data.joint_ids(unused_bos) == [unused_bos.eos_token_id]


def test_a_tokenizer_that_begins_texts_with_bos_keeps_doing_so(tokenizer):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bos = backend.token_to_id("<|padding|>")
    backend.post_processor = TemplateProcessing(single="<|padding|> $A", special_tokens=[("<|padding|>", bos)])
    begins = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|padding|>", eos_token="<|endoftext|>")
    assert data.joint_ids(begins) == [begins.eos_token_id, bos]
    ids = tokenizer("def f")["input_ids"]
    blocks = data.token_blocks(["def f", "def f"], begins, 2 * len(ids) + 3)
    assert blocks.tolist() == [[bos, *ids, begins.eos_token_id, bos, *ids]]
    assert data.held_out_windows(["def f"], begins, 8).input_ids[0, 0] == bos


@given(st.text(st.sampled_from("ab \n\té"), max_size=60))
def test_pieces_are_the_document(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_PIECE", 7)
        pieces = list(data._pieces(text))
    assert "".join(pieces) == text
    assert all(len(piece) <= 7 for piece in pieces)
    assert all(pieces) or text == ""


def test_pieces_end_at_lines_that_no_blank_follows(monkeypatch):
    monkeypatch.setattr(data, "_PIECE", 12)
    assert list(data._pieces("one\ntwo\n  three\nfour")) == ["one\n", "two\n  three\n", "four"]


def test_long_documents_get_the_same_tokens_in_pieces_and_batches(tokenizer, monkeypatch):
    documents = ["".join(TEXT), "x", "", "\n".join(TEXT)]
    whole = [ids.tolist() for ids in data.encode(documents, tokenizer)]
    assert whole == tokenizer(documents)["input_ids"]
    monkeypatch.setattr(data, "_PIECE", 100)
    monkeypatch.setattr(data, "_BATCH", 250)
    assert [ids.tolist() for ids in data.encode(documents, tokenizer)] == whole


@settings(deadline=None)
@given(
    st.lists(st.text(st.sampled_from("def x+1 \né字"), max_size=40), min_size=1, max_size=5),
    st.integers(2, 12),
    st.booleans(),
)
def test_every_held_out_token_is_scored_once(tokenizer, bare, documents, length, with_start):
    chosen = tokenizer if with_start else bare
    ids = [tokenizer(text)["input_ids"] for text in documents]
    # Without a token before it, the first one has nothing to be predicted from.
    scored = [tokens if with_start else tokens[1:] for tokens in ids]
    kept = [index for index, tokens in enumerate(scored) if tokens]
    if not kept:
        assert "no token to score" in message(data.held_out_windows, documents, chosen, length)
        return
    windows = data.held_out_windows(documents, chosen, length)
    assert windows.input_ids.shape == windows.labels.shape == (len(windows.document), length)
    assert (windows.labels[:, 0] == data.IGNORED).all()
    for number, index in enumerate(kept):
        rows = windows.labels[windows.document == number]
        assert rows[rows != data.IGNORED].tolist() == scored[index]
        first = "" if with_start else chosen.decode(ids[index][:1])
        assert windows.text_bytes[number] == len(documents[index].encode()) - len(first.encode())
    for row, labels, count in zip(windows.input_ids, windows.labels, windows.lengths, strict=True):
        assert labels[1:count].tolist() == row[1:count].tolist()
        assert (labels[count:] == data.IGNORED).all()


def test_windows_follow_each_other_with_one_token_in_common(tokenizer):
    text = "def f1(x): return x + 1 + 2 + 3"
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    windows = data.held_out_windows([text], tokenizer, 5)
    assert windows.input_ids[0].tolist() == ids[:5]
    assert windows.input_ids[1].tolist() == ids[4:9]


def test_windows_are_saved_whole(tokenizer, tmp_path):
    windows = data.held_out_windows(TEXT[:3], tokenizer, 8)
    files.write_binary(tmp_path / "new" / "windows.npz", windows.save)
    again = data.Windows.load(tmp_path / "new" / "windows.npz")
    for name, array in vars(windows).items():
        assert np.array_equal(getattr(again, name), array)
        assert getattr(again, name).dtype == array.dtype
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["windows.npz"]


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_binary(tmp_path / "blocks.npy", fail)
    assert list(tmp_path.iterdir()) == []
