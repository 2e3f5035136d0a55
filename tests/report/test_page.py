"""The page: everything in one file, names of files as text, what is lacking said in its place."""

import json
import re
import shutil
from pathlib import Path

import pytest

from llmq import registry
from llmq.errors import LlmqError
from llmq.report import write
from llmq.report.page import page, shown
from llmq.report.read import Told, read

GOLDEN = Path(__file__).parents[1] / "golden"
HOSTILE = "model.layers.0.</script><script>alert(1)</script>.up_proj"


def specs(html):
    return json.loads(re.search(r'id="specs">(.*?)</script>', html, re.S)[1])


def test_a_run_with_report_has_all_plots(made):
    html = (made.int4 / "report.html").read_text()
    assert made.record["report"] == str(made.int4 / "report.html") and (made.int4 / "timings.json").is_file()
    assert {"size", "heat", "profile", "codes", "scales", "clipping", "stages", "memory"} <= specs(html).keys()
    assert {"channels-awq", "channels-as-solved"} <= specs(html).keys()
    assert "It was not evaluated" in html and "The model has no experts" in html
    assert len(html) < 1.2e6


def test_nothing_is_fetched_and_no_path_is_told(made):
    html = (made.int4 / "report.html").read_text()
    marked = re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert not re.search(r"(src|href)=[\"'](?!data:|#)|url\(|@import", marked)
    assert "default-src 'none'" in html and str(made.folder) not in html


def test_several_side_by_side_with_figures(made, evaluated, tmp_path):
    other = evaluated(shutil.copytree(made.int4, tmp_path / "int4b"), kl_mean=0.5)
    files = write([made.int4, other, made.gguf], tmp_path / "r.html", against=made.src)
    found = specs(files[0].read_text())
    assert {"cost", "positions", "classes", "categories", "heat-int4", "heat-int4b", "heat-q4.gguf"} <= found.keys()
    html = files[0].read_text()
    assert html.count("The model has no experts") == 1  # said once of all
    assert len(set(re.findall(r"(model\.\S+): (?:INT|Q4_0), 4 bits", html))) == 1  # one linear's codes of all three
    heats = [spec["layer"][0]["encoding"]["color"] for k, spec in found.items() if k.startswith("heat")]
    assert len(heats) == 3 and heats[0] == heats[1] == heats[2] and heats[0]["legend"]["title"] == "weight error"
    with pytest.raises(LlmqError, match="exists"):
        write([made.int4], tmp_path / "r.html")
    write([made.int4], tmp_path / "r.html", overwrite=True)


def test_a_peers_checkpoint_says_what_it_lacks(tmp_path):
    files = write([GOLDEN / "awq_w4g32"], tmp_path / "r.html", png=tmp_path / "png")
    html = files[0].read_text()
    assert {f.name for f in files[1:]} == {f"{k}.png" for k in specs(html)}
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files[1:])
    assert {"codes", "scales"} <= specs(html).keys() and not specs(html).keys() & {"heat", "channels", "clipping"}
    for said in ("No errors were recorded", "No channels were recorded", "--against SRC", "Times are kept by"):
        assert said in html, said


def told(linears, **more):
    """Return what is known of a checkpoint whose record says this, and whose weights are those of a peer's."""
    known = read(GOLDEN / "awq_w4g32", "x")
    return Told(**{**vars(known), "record": {"linears": linears, **more}})


def test_names_of_tensors_stay_text(tmp_path):
    line = {"weight_error": 0.1, "bits": 4, "method": "rtn", "trouble": {"<b>kind</b>": "</script><img src=x>"}}
    one = told({HOSTILE: line}, warnings=["<i>mind</i>"])
    html = page(shown([one]), [one])
    assert "<script>alert" not in html and "<img src=x" not in html and "<b>kind" not in html and "<i>mind" not in html
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in html and html.count("<script") == 4


@pytest.mark.parametrize(
    "odd", [10**400, float("nan"), float("inf"), 1e308, 5e-324], ids=["huge", "nan", "inf", "large", "tiny"]
)
def test_numbers_that_no_figure_is_made_of_break_no_page(made, evaluated, tmp_path, odd):
    """JSON as Python reads it has numbers that no browser takes, and some that no float holds."""
    line = {"weight_error": odd, "output_error": odd, "bits": odd}
    linears = {f"model.layers.{i}.mlp.{n}_proj": line for i in (0, 1, "9" * 5000) for n in ("up", "down")}
    figures = {name: odd for name in ("perplexity", "kl_mean", "kl_p99", "top1", "tokens")}
    out = evaluated(shutil.copytree(made.int4, tmp_path / "odd"), classes={"word": figures}, **figures)
    known = read(out, "x")
    one = Told(**{**vars(known), "record": {"linears": linears, "experts": {"layers": {"layers.0.mlp": [1, odd]}}}})
    html = page(shown([one]), [one])
    assert not re.search(r"NaN|Infinity", re.search(r'id="specs">(.*?)</script>', html, re.S)[1])


def test_what_a_record_has_many_of_is_cut():
    one = told({f"head{i}": {"weight_error": 0.1} for i in range(30_000)}, warnings=["w" * 100] * 30_000)
    html = page(shown([one]), [one])
    assert len(html) < 2e6 and "29,800 more are in the record" in html


@pytest.mark.parametrize("experts", [0, 128])
def test_the_largest_models_stay_below_three_megabytes(experts):
    leaves = [f"mlp.experts.{e}.{p}_proj" for e in range(experts) for p in ("gate", "up", "down")] or [
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    ]
    leaves += [f"self_attn.{p}_proj" for p in "qkvo"]
    line = {"weight_error": 0.0123456789, "output_error": 0.00123456789, "bits": 4, "method": "gptq"}
    blocks = 94 if experts else 126  # Qwen3-235B, Llama-3.1-405B
    linears = {f"model.layers.{i}.{leaf}": line for i in range(blocks) for leaf in leaves}
    q = [0.1, 0.2, 0.3, 0.4, 9.5, 31.2]
    sites = [["self_attn.q_proj"], ["self_attn.o_proj"], ["mlp.gate_proj"], ["mlp.down_proj"]]
    seen = [
        {"block": i, "linears": [f"model.layers.{i}.{n}" for n in site], "max": q, "after": q, "channel": 7} | step
        for i in range(blocks) for site in sites for step in ({"step": "smoothquant"}, {})
    ]  # fmt: skip
    counts = {f"model.layers.{i}.mlp.experts": list(range(1000, 1000 + experts)) for i in range(blocks)}
    one = told(linears, activations=seen, **({"experts": {"layers": counts}} if experts else {}))
    html = page(shown([one]), [one])
    assert len(html) < 3e6 and ("experts" in specs(html)) == bool(experts)


def test_every_plot_says_what_it_is():
    plots = [registry.find("report.plots", name) for name in registry.names("report.plots")]
    assert len(plots) > 18 and len({p.rank for p in plots}) == len(plots)
    assert all(p.section and p.title and p.reads.endswith(".") for p in plots)
