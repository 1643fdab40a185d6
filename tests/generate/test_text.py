"""Text is told once it is certain, ends exactly before a stop string, and is printed in order."""

import random

import pytest

from zoo.data import tokenizer
from zoo.errors import UsageError
from zoo.generate.output import Finished, Printer
from zoo.generate.text import StopStrings, TextStream

BYTES = tokenizer.load("bytes")


def stopped(text, stops):
    """The definition: character by character, the string that is complete first, of those the longest."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def test_stop_strings_are_found_however_the_text_is_cut():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=12))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        looking, told, found = StopStrings(stops), "", False
        cuts = sorted(rng.choices(range(13), k=4))
        for start, end in zip([0, *cuts], [*cuts, 12], strict=True):
            piece, found = looking.push(text[start:end])
            told += piece
            assert stopped(text, stops)[0].startswith(told)
            if found:
                break
        assert (told + looking.flush(), found) == stopped(text, stops)


def test_no_more_is_held_back_than_may_begin_a_stop_string():
    looking = StopStrings(["\n\nUser:", "###"])
    assert [looking.push(piece)[0] for piece in ("a#", "#b\n", "c", "\n\nUs")] == ["a", "##b", "\nc", ""]
    assert looking.push("ed") == ("\n\nUsed", False)


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        (["x", ""], "stop: got an empty string"),
        (["x"] * 101, "stop: got 101 strings"),
        (["x" * 10_001], "of 10001 characters; expected at most 100, of at most 10,000"),
    ],
)
def test_stop_strings_that_make_no_sense_are_refused(stops, message):
    with pytest.raises(UsageError, match=message):
        StopStrings(stops)


def test_a_streams_tokens_are_those_of_its_text():
    tokens = list("aé\n\nUser".encode())
    for stops, text in (((), "aé\n\nUser"), (("\n\n",), "aé"), (("é",), "a"), (("a",), ""), (("rx",), "aé\n\nUser")):
        stream, told = TextStream(BYTES, list(b"> "), stops), ""
        pushed, found = [], False
        while len(pushed) < len(tokens) and not found:
            pushed.append(tokens[len(pushed)])
            piece, found = stream.push(pushed[-1])
            told += piece
        told += "" if found else stream.end()[0]
        assert (stream.prompt, stream.text, told) == ("> ", text, text)
        assert stream.tokens(pushed) == list(text.encode())


class Pairs:
    """A tokenizer whose tokens are two characters each, as a stop string's cut sees them."""

    separator_id = 0

    def stream_decoder(self):
        return tokenizer.BytesDecoder(self)

    def decode_bytes(self, ids):
        return b"".join(bytes(divmod(i, 256)) for i in ids)

    def encode(self, text):
        return tokenizer.load("bytes").encode(text)


def test_what_a_stop_string_cuts_off_inside_a_token_is_encoded_anew():
    stream, tokens = TextStream(Pairs(), stops=["cd"]), [int.from_bytes(pair) for pair in (b"ab", b"xc", b"de")]
    assert [stream.push(token) for token in tokens] == [("ab", False), ("x", False), ("", True)]
    assert stream.tokens(tokens) == [tokens[0], ord("x")]


# --- Printing ---------------------------------------------------------------------------------------------------------


def test_characters_are_printed_when_they_are_whole(capsys):
    prompt, text = "> é".encode()[:-1], "é漢".encode()[1:] + b"\xff\xe6"  # begun in the prompt; no UTF-8; unfinished
    stream = TextStream(BYTES, prompt)
    printer = Printer(1, lambda _: stream.prompt)
    shown = [capsys.readouterr().out]
    for byte in text:
        printer.piece(0, stream.push(byte)[0])
        shown.append(capsys.readouterr().out)
    printer.piece(0, stream.end()[0])
    printer.finish(0, None)
    shown.append(capsys.readouterr().out)
    assert shown == ["> ", "é", "", "", "漢", "\ufffd", "", "\ufffd\n"]


def test_texts_are_printed_in_order_the_first_unfinished_one_as_it_is_made(capsys):
    printer, shown = Printer(3, lambda n: f"{n}: "), []
    for number, piece in ((1, "B"), (0, "A"), (2, "C"), (1, None), (0, "a"), (0, None), (2, "c"), (2, None)):
        printer.piece(number, piece) if piece else printer.finish(number, Finished("", "length", 1, []))
        shown.append(capsys.readouterr().out)
    assert shown == ["0: ", "A", "", "", "a", "\n1: B\n2: C", "c", "\n"]


def test_control_characters_are_shown_not_obeyed_unless_raw(capsys):
    for raw in (False, True):
        printer = Printer(2, lambda n: "a\x1b"[n], raw)
        printer.piece(0, "[31m\n\tb\x9b")
        printer.finish(0, None)
        printer.piece(1, "\x07")
        output = capsys.readouterr().out
        assert ("\x1b" in output) == ("\x07" in output) == raw
    Printer(1, lambda _: "a\x1b")
    assert capsys.readouterr().out == "a\\x1b"
