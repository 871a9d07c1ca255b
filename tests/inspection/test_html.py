import base64
import json
import re

import pytest
import torch
from helpers.strategies import normal

from ptq4vm.inspection.figures import draw
from ptq4vm.inspection.html import write_page
from ptq4vm.inspection.layers import COLUMNS, Layer, Report
from ptq4vm.inspection.statistics import FINEST, PERCENTILES, Activation

EVIL = '</script><img src="x" onerror="alert(1)"> & <!-- "\u2028'


def report(names=("layers.0.in_proj", "layers.0.out_proj"), shape=(3, 7, 5), quantized=True, smoothed=True) -> Report:
    layers = []
    for seed, name in enumerate(names):
        x = normal(*shape, seed=seed)
        layer = Layer(name=name, activation=Activation(*shape[1:]))
        dequantized = x.round() if quantized else None
        if dequantized is not None:
            layer.input.add(x, dequantized)
        layer.activation.add(x, torch.ones(shape[2]) if smoothed else None, dequantized)
        layers.append(layer)
    if quantized:
        rows = [layer.row() | {"smooth_min": None} for layer in layers]
    else:
        rows = [{"name": layer.name, "peak": layer.activation.peak} for layer in layers]
    columns = {key: COLUMNS.get(key, key) for key in rows[0]}
    return Report(title=names[0], facts={"model": names[0]}, columns=columns, rows=rows, layers=layers)


def content(page: str) -> dict:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(data)


@pytest.mark.parametrize("quantized", [True, False])
def test_the_page_holds_all_it_shows(tmp_path, quantized):
    made = report(quantized=quantized)
    data = content(write_page(made, tmp_path / "new" / "report.html").read_text())
    keys = [key for key in made.columns if key != "smooth_min"]  # nothing is known of it
    assert data["columns"] == [[key, made.columns[key]] for key in keys]
    assert data["rows"] == [{key: row[key] for key in keys} for row in made.rows]
    assert list(data["linears"]) == [layer.name for layer in made.layers]
    for figures, layer in zip(data["linears"].values(), made.layers, strict=True):
        assert (figures["tokens"], figures["channels"], figures["images"]) == (7, 5, 3)
        for surface, exact in zip(figures["surfaces"], layer.activation.surfaces().values(), strict=True):
            heights = torch.frombuffer(bytearray(base64.b64decode(surface["heights"])), dtype=torch.uint8)
            found = heights.view(surface["shape"]) * surface["highest"] / 255
            assert (found - exact).abs().max() <= surface["highest"] / 500
        for band, exact in zip(figures["bands"], layer.activation.bands().values(), strict=True):
            assert torch.allclose(torch.tensor(band["values"]), exact, rtol=1e-3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_the_page_needs_nothing_else(tmp_path):
    page = write_page(report(), tmp_path / "report.html").read_text()
    assert not re.search(r"\b(src|href|action)\s*=|@import|\burl\(|\bimport\b|\bfetch\(|XMLHttp|WebSocket", page)
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "default-src 'none'" in page and "{{" not in page


def test_names_cannot_break_out(tmp_path):
    page = write_page(report(names=(EVIL, "other")), tmp_path / "report.html").read_text()
    assert "<img" not in page and page.count("</script>") == 2 and "innerHTML" not in page
    data = content(page)
    assert data["title"] == data["rows"][0]["name"] == EVIL and list(data["linears"]) == [EVIL, "other"]


def test_a_page_does_not_grow_with_the_model(tmp_path):
    large, larger = (
        len(write_page(report(shape=(1, n, n)), tmp_path / f"{n}.html").read_text()) for n in (FINEST, 4 * FINEST)
    )
    assert larger < 1.3 * large
    figures = content((tmp_path / f"{4 * FINEST}.html").read_text())["linears"]["layers.0.in_proj"]
    assert all(surface["shape"] == [FINEST, FINEST] for surface in figures["surfaces"])
    assert len(figures["bands"][0]["values"]) == len(PERCENTILES)


@pytest.mark.parametrize(
    ("shape", "quantized"), [((2, 1, 1), True), ((1, 1, 5), True), ((1, 7, 1), True), ((1, 1, 1), False)]
)
def test_the_smallest_activations_have_pictures(tmp_path, shape, quantized):
    made = report(shape=shape, quantized=quantized, smoothed=False)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in draw(made, tmp_path, 1))
    write_page(made, tmp_path / "report.html")


def test_a_picture_for_each_of_the_worst(tmp_path):
    made = report(names=("a/../b", "c@1", "d"))
    paths = draw(made, tmp_path / "new", 2)
    assert [path.name for path in paths] == ["overview.png", "a_.._b.png", "c@1.png"]
    assert sorted((tmp_path / "new").iterdir()) == sorted(paths)
