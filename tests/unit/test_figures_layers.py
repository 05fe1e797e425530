"""The figures of an emulator's layers."""

import json
import math

import pytest

from emloc.report.draw.layers import RUNS, kinds_of, layers_of
from emloc.report.figures import figures
from emloc.report.rows import Row

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj")


def facts(rank: int, energy_kept: float, spectrum: bool = True) -> dict:
    layer = {
        "rank": rank,
        "kept": energy_kept,
        "seen": rank,
        "solver": "eigen",
        "steps": 0,
        "seconds": 0,
    }
    if spectrum:
        spectrum_record = {"index": [1, 2, 4, 10], "energy": [60.0, 20.0, 10.0, 0.0]}
        layer["spectrum"] = {**spectrum_record, "total": 100.0, "directions": 10}
    return layer


def table(prefix: str = "model.layers", spectrum: bool = True) -> dict:
    return {
        f"{prefix}.{block}.self_attn.{kind}": facts(4 + block, 0.9 + 0.04 * block, spectrum)
        for kind in KINDS
        for block in (0, 1)
    }


@pytest.fixture
def runs(tmp_path):
    """Function that writes runs with one `layers.json` each and returns their rows."""

    def write(*tables: dict, **settings: str) -> list[Row]:
        rows = []
        for at, one in enumerate(tables):
            folder = tmp_path / f"run{at}"
            folder.mkdir(exist_ok=True)
            (folder / "layers.json").write_text(json.dumps(one))
            fixed_settings = {"compression.ratio": f"0.{at + 1}"} | settings
            fields = {"experiment": "x", "run": f"run{at}", "state": "done", "cell": ""}
            named = {"method": "emloc", "model": "m", "task": "t", "metric": "f1", "data": ""}
            rows.append(
                Row(**fields, **named, seed=0, settings=fixed_settings, numbers={"score": 0.5})
            )
        return rows

    return write


def test_a_layer_name_is_split_into_tower_block_and_kind():
    result = layers_of(
        {
            "model.vision_tower.encoder.layer.11.attention.projection_layer": facts(4, 0.75),
            "model.language_model.layers.2.self_attn.q_proj": facts(8, 1.0),
        }
    )
    first, second = result
    assert (first.tower, first.block, first.kind) == ("model.language_model.layers", 2, "q")
    assert (second.block, second.kind) == (11, "projection")
    assert (second.rank, second.lost) == (4, 0.25)
    assert second.share == (0.6, 0.2, 0.1, 0.0)


def test_kinds_are_ordered_as_a_block_computes_them():
    names = ("mlp.down_proj", "self_attn.v_proj", "mlp.other", "self_attn.q_proj")
    result = layers_of({f"model.layers.0.{name}": facts(4, 0.9) for name in names})
    assert kinds_of(result) == ["q", "v", "down", "other"]


def test_rank_energy_lost_and_spectra_by_depth(runs, tmp_path):
    (figure,) = figures(runs(table()), tmp_path).values()
    rank, lost, *spectra, bar = figure.axes
    assert [list(line.get_ydata()) for line in rank.get_lines()] == [[4, 5]] * 4
    (q, *_) = lost.get_lines()
    assert list(q.get_xdata()) == [0, 1]
    assert list(q.get_ydata()) == [pytest.approx(0.1), pytest.approx(0.06)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["q", "k", "v", "o"]
    assert figure.legends[0].get_title().get_text() == "emloc, 10% of parameters, m"
    assert [axes.get_title() for axes in spectra] == ["q", "k", "v", "o"]
    assert bar.get_ylabel() == "block"
    line, dot, *_ = spectra[0].get_lines()
    assert list(line.get_xdata()) == [0.1, 0.2, 0.4, 1.0]
    assert list(line.get_ydata())[:3] == [0.6, 0.2, 0.1]
    assert math.isnan(line.get_ydata()[3])  # zero is not drawn on a logarithmic axis
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([0.4], [pytest.approx(0.1)])


def test_the_dot_of_the_rank_lies_on_the_interpolated_line(runs, tmp_path):
    (figure,) = figures(runs({"a.0.q_proj": facts(3, 0.9)}), tmp_path).values()
    _, dot = figure.axes[2].get_lines()
    steep = math.log(3 / 2) / math.log(4 / 2)
    assert list(dot.get_ydata()) == [pytest.approx(0.2 * (0.1 / 0.2) ** steep)]


def test_without_spectra_two_panels_are_drawn(runs, tmp_path):
    (figure,) = figures(runs(table(spectrum=False)), tmp_path).values()
    assert [axes.get_ylabel() for axes in figure.axes] == ["rank kept", "output energy lost"]


def test_language_and_vision_have_separate_figures(runs, tmp_path):
    both = table("model.language_model.layers") | table("model.vision_tower.encoder.layer")
    result = figures(runs(both), tmp_path)
    assert set(result) == {"layers_run0_language", "layers_run0_vision"}
    titles = {figure.legends[0].get_title().get_text() for figure in result.values()}
    assert "emloc, 10% of parameters, m, vision tower" in titles


def test_one_run_per_size_and_few_in_all_are_drawn(runs, tmp_path):
    rows = runs(*[table()] * (RUNS + 2))
    result = [name for name in figures(rows, tmp_path) if name.startswith("layers")]
    assert result == [f"layers_run{at}" for at in range(RUNS)]
    same = runs(*[table()] * 2, **{"compression.ratio": "0.5"})
    assert list(figures(same, tmp_path)) == ["layers_run0"]


def test_a_run_with_spectra_is_preferred(runs, tmp_path):
    rows = runs(table(spectrum=False), table(), **{"compression.ratio": "0.5"})
    assert list(figures(rows, tmp_path)) == ["layers_run1"]


def test_the_folder_of_a_single_run_is_drawn(runs, tmp_path):
    rows = runs(table())
    (tmp_path / "run0" / "status.json").write_text("{}")
    assert list(figures(rows, tmp_path / "run0")) == ["layers_run0"]


@pytest.mark.parametrize(
    "other",
    [
        {"model.layers.0.mlp.up_proj": {"bits": 4}},
        {"model.layers.0.mlp.up_proj": {"shape": [4, 8], "bits": 16, "kept": 3, "of": 8}},
        {"kept": [0, 1], "bits": 16},
    ],
    ids=["full", "prune", "layer_drop"],
)
def test_an_emulator_without_ranks_gives_no_figure(runs, tmp_path, other):
    assert figures(runs(other), tmp_path) == {}


def test_a_tidy_file_gives_no_figures_of_layers(runs, tmp_path):
    rows = runs(table())
    path = tmp_path / "elsewhere" / "rows.csv"
    assert figures(rows, path) == {}
