from tokenwise.models.token_text import token_texts


def test_token_texts_give_the_text_again():
    text = "  añ 🙂 x\n"
    # A byte-level tokenizer: the emoji's four bytes are two tokens that both cover the whole character.
    offsets = [(0, 0), (2, 4), (5, 6), (5, 6), (7, 8), (8, 9)]
    names = ["<s>", "aÃ±", "ðŁ", "ĻĤ", "x", "Ċ"]
    assert token_texts(text, offsets, names) == ["<s>", "  añ", " 🙂", "·", " x", "\n"]
