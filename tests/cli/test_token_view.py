import html
import re

import pytest
from rich.console import Console

from tokenwise.cli.token_view import TokenView, print_view, write_html

VIEW = TokenView("half on m", ["a<b", " c\n", "[bold]d"], [None, 0.0, 1.5], [None, 2.0, 4.0])


@pytest.fixture
def printed(monkeypatch):
    """What a view prints, on a terminal with or without colour."""

    def run(view, **options):
        monkeypatch.delenv("NO_COLOR", raising=False)
        console = Console(width=80, record=True, **options)
        with console.capture() as capture:
            print_view(console, view)
        return capture.get()

    return run


def test_without_colour_the_weights_are_numbers(printed):
    lines = printed(VIEW, force_terminal=False).splitlines()
    assert lines[0] == "half on m"
    assert lines[2:5] == ["       -       -  'a<b'", "       0       2  ' c\\n'", "     1.5       4  '[bold]d'"]
    assert lines[5] == "2 predicted tokens, mean weight 0.75, 50% with a weight above 0, mean loss 3 nats/token"


def test_no_color_is_respected(printed):
    out = printed(VIEW, force_terminal=True, color_system="truecolor", no_color=True)
    assert "     1.5       4  " in out
    assert "\x1b" not in out


def test_in_colour_the_text_is_whole_and_zero_is_dim(printed):
    out = printed(VIEW, force_terminal=True, color_system="truecolor")
    assert "\x1b[2m c↵\x1b[0m" in out
    assert re.search(r"\x1b\[30;48;2;255;138;40m\[bold\]d\x1b", out)  # the largest weight: full colour
    assert "weight " in out
    assert "mean weight 0.75" in out


def test_all_weights_zero_is_drawn(printed):
    view = TokenView("nothing", ["a", "b"], [None, 0.0], [None, 1.0])
    assert "0% with a weight above 0" in printed(view, force_terminal=True, color_system="truecolor")


def test_page_holds_everything_itself(tmp_path):
    path = tmp_path / "new" / "page.html"
    write_html(path, VIEW)
    page = path.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"""(src|href)\s*=|@import|url\(""", page)
    body = re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)[1]
    assert html.unescape(re.sub(r"<[^>]*>", "", body)).strip("\n") == "a<b c↵\n[bold]d"
    assert 'title="weight 1.5, 4 nats"' in body
    assert "--s:100" in body


def test_prompts_stand_back_and_their_attention_is_shown(printed, tmp_path):
    view = TokenView("chat", ["ask", "me", "yes"], [None, None, 1.0], [None, None, 0.5], [None, None, 0.25])
    out = printed(view, force_terminal=True, color_system="truecolor")
    assert "\x1b[2;3mask\x1b[0m\x1b[2;3mme\x1b[0m" in out
    assert "\x1b[2;3mread, not learnt\x1b[0m" in out
    numbers = printed(view, force_terminal=False).splitlines()
    assert numbers[1:5:3] == ["  weight    nats  prompt  token", "       1     0.5    0.25  'yes'"]
    write_html(tmp_path / "page.html", view)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('class="prompt" title="read, not learnt"') == 2
    assert 'title="weight 1, 0.5 nats, 0.25 of its attention on the prompt"' in page


SIGNED = TokenView("ascent", ["a", "b", "c"], [None, -2.0, 1.0], [None, 1.0, 1.0], quantity="factor")


def test_below_zero_is_another_colour_with_a_legend_of_both_signs(printed, tmp_path):
    out = printed(SIGNED, force_terminal=True, color_system="truecolor")
    assert "\x1b[30;48;2;82;160;255mb\x1b" in out
    legend = re.sub(r"\x1b\[[^m]*m", "", out).splitlines()
    assert [float(word) for word in legend[4].split()[1:6]] == [-2, -1, 0, 1, 2]
    assert legend[5] == "factor of the gradient of the token's loss; below 0 the loss is raised"
    write_html(tmp_path / "page.html", SIGNED)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<span class="w below" style="--s:100" title="factor -2, 1 nats">b</span>' in page
    assert '<span class="w" style="--s:50" title="factor 1, 1 nats">c</span>' in page
    assert "50% with a factor above 0, 50% below 0" in page
