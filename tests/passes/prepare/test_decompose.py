"""Operators taken apart: the same numbers, and places to quantize them."""

import pytest
import timm
import torch
from helpers.strategies import normal

import ptq4vm.models  # noqa: F401
from ptq4vm import QuantConfig, calibrate, convert, fuse, load, ops, prepare, save
from ptq4vm.graph.capture import capture
from ptq4vm.graph.insert import aten
from ptq4vm.graph.sites import LinearSite, Site, find_linears, sites_of
from ptq4vm.metadata import metadata_of
from ptq4vm.passes.prepare.canonicalize import canonicalize
from ptq4vm.passes.prepare.decompose import decompose_fused_ops
from ptq4vm.passes.prepare.select import SelectSites
from ptq4vm.passes.quantized_nodes import quantized_convolutions, quantized_linears, quantized_outputs, quantized_scans
from ptq4vm.quantization_specs import Granularity, OutputQuantization, StateQuantization
from ptq4vm.quantizers import Mode

NAMES = ["vim_nano_patch4_32", "local_vim_nano_patch4_32", "vmamba_nano_32", "local_vmamba_nano_32"]
KSCALED = QuantConfig.kscaled()
NAIVE = QuantConfig.recipe("kscaled_naive", 8)


@pytest.fixture(scope="module")
def kscaled(roads):
    return roads.calibrated(KSCALED)


def exposed(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    return model, x, decompose_fused_ops(canonicalize(capture(model, (x,))))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_what_it_did(name):
    model, x, gm = exposed(name)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    with torch.no_grad():
        wanted = model(x)
        assert (gm(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not any(node.args[3] for node in gm.graph.find_nodes(op="call_function", target=ops.causal_conv1d.default))
    scans = gm.graph.find_nodes(op="call_function", target=ops.selective_scan.default)
    assert scans and all(node.args[5:] == (None, None, None, False) for node in scans)
    linears = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert len(find_linears(gm)) == len(linears)


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_everything_that_the_paper_quantizes_is_found(name):
    _, _, gm = exposed(name)
    sites = sites_of(SelectSites(KSCALED)(gm), Site)
    assert len({site.name for site in sites.values()}) == len(sites)
    kinds = {node.target for node in sites}
    assert {aten.linear.default, aten.silu.default, aten.softplus.default, ops.selective_scan.default} <= kinds
    assert kinds & {aten.conv2d.default, ops.causal_conv1d.default} and kinds & {
        aten.rms_norm.default,
        aten.layer_norm.default,
    }
    for node, site in sites.items():
        several = site.output.granularity is not Granularity.PER_TENSOR
        if node.target in (ops.selective_scan.default, ops.causal_conv1d.default, aten.softplus.default):
            assert several
        if several:
            assert node.meta["val"].shape[site.output.axis] > 1
        tokens = site.output.granularity is Granularity.K_SCALED_TOKEN
        writes = site.name.endswith(("out_proj", "fc2", "reduction"))
        assert tokens == (node.target is ops.selective_scan.default or writes)
    shared = {site.name.rsplit(".", 1)[-1]: site.shares_qparams_with for site in sites_of(gm, LinearSite).values()}
    assert "norm" in shared["in_proj"] and (shared["head"] is None or name == "vim_nano_patch4_32")
    naive = sites_of(SelectSites(NAIVE)(gm), Site).values()
    assert all(site.output.granularity is Granularity.PER_TENSOR for site in naive)


def test_a_linear_reads_the_codes_of_what_made_its_input(kscaled, images):
    """Rounded once: what a linear's input gives is what it was given."""
    outputs = {output.name: output.fake for output in quantized_outputs(kscaled)}
    followers = 0
    for linear in quantized_linears(kscaled):
        source = outputs.get(linear.input.shares_qparams_with)
        if source is None:
            continue
        followers += 1
        x = source(normal(2, 5, 4) * source.scale * 40)
        assert linear.smooth is None and torch.equal(linear.input(x), x)
    # in_proj, dt_proj of both directions in each of two blocks, and the head
    assert followers == 2 * 3 + 1


def test_every_quantizer_has_step_sizes_and_is_on(kscaled):
    fakes = [output.fake for output in quantized_outputs(kscaled)]
    fakes += [convolution.fake for convolution in quantized_convolutions(kscaled)]
    fakes += [scan.fake for scan in quantized_scans(kscaled)]
    # two blocks: norm, 5 kinds of linears, conv1d, SiLU twice, softplus, scan by direction, and the ends
    assert len(quantized_scans(kscaled)) == 4 and len(quantized_convolutions(kscaled)) == 5
    assert all(fake.mode is Mode.QUANTIZE and fake.scale is not None for fake in fakes)


def test_the_three_forms_are_one_model(kscaled, images, tmp_path):
    with torch.no_grad():
        wanted = kscaled(images)
        assert torch.equal(convert(kscaled, lower=False)(images), wanted)
        lowered = convert(kscaled)
        # integer sums round otherwise than float ones, which moves codes that lie on a border
        assert ((lowered(images) - wanted).norm() / wanted.norm()) <= 0.02
        left = [node for node in lowered.graph.nodes if "quantized_decomposed" in str(node.target)]
        convolutions = len(quantized_convolutions(kscaled))
        assert len(left) == convolutions  # their weights
        loaded = load(save(lowered, tmp_path / "saved"), model=_model())
        assert torch.equal(loaded(images), lowered(images))


def _model():
    from ptq4vm.models import Vim

    return Vim(img_size=16, patch_size=4, embed_dim=32, depth=2, state=4, num_classes=10)


def test_the_state_alone(roads, images, small_vim):
    gm = roads.calibrated(QuantConfig.recipe("state", 8))
    lowered = convert(gm)
    assert not lowered.graph.find_nodes(op="call_function", target=ops.linear.default)
    assert len(lowered.graph.find_nodes(op="call_function", target=ops.selective_scan_quantized.default)) == 4
    with torch.no_grad():
        exact = small_vim(images)
        assert 0 < (lowered(images) - exact).norm() <= 0.05 * exact.norm()


def test_one_interval_for_all_steps_leaves_the_factors_of_tokens(roads):
    """They are in the steps, which then are one number times them."""
    several, one = (
        quantized_scans(roads.calibrated(QuantConfig.recipe("state", 8, state={"per_token": each})))[0].fake.scale
        for each in (True, False)
    )
    assert len(several) == len(one) == 17 and len(one.unique()) > 1
    ratios = several / one
    assert ratios.max() <= 1.5 * ratios.min() < one.max() / one.min()


@pytest.mark.slow
def test_both_papers_at_once_learn(roads, images):
    from ptq4vm.quantization_specs import Learning

    config = QuantConfig.recipe("ptq4vm+state", 8, learning=Learning(epochs=1, batch_size=6))
    gm = roads.calibrated(config)
    assert all(block["loss_after"] <= block["loss_before"] for block in metadata_of(gm).blocks)
    with torch.no_grad():
        assert torch.equal(convert(gm, lower=False)(images), gm(images))


def test_a_calibration_goes_on_where_it_stopped(roads, images, tmp_path, monkeypatch):
    from ptq4vm.passes.calibrate import blockwise as module

    done, run = [], module.choose_qparams

    def stop(quantizers, *rest):
        done.append(quantizers)
        if len(done) == 3:
            raise KeyboardInterrupt
        run(quantizers, *rest)

    monkeypatch.setattr(module, "choose_qparams", stop)
    gm = roads.prepared(KSCALED)
    with pytest.raises(KeyboardInterrupt):
        calibrate(gm, images.split(5), resume_dir=tmp_path, progress=False)
    monkeypatch.setattr(module, "choose_qparams", run)
    again = calibrate(roads.prepared(KSCALED), images.split(5), resume_dir=tmp_path, progress=False)
    whole = roads.calibrated(KSCALED)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert metadata_of(again).blocks == metadata_of(whole).blocks


@pytest.mark.slow
def test_calibrating_again_gives_the_same(roads, images):
    gm = roads.calibrated(KSCALED)
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    calibrate(gm, images.split(5), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())


def test_a_state_without_a_scan_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="state is for models with a selective scan"):
        prepare(model, (torch.randn(2, 3, 4),), QuantConfig(state=StateQuantization()))


def test_outputs_of_a_model_without_scans():
    """Any vision model whose linears see a fixed number of tokens."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    x = normal(16, 5, 8)
    config = QuantConfig(smoothing=None, outputs=OutputQuantization())
    gm = calibrate(prepare(model, (x,), config), [x], progress=False)
    assert [output.name for output in quantized_outputs(gm)] == ["0.norm", "1", "2.gelu", "3"]
    with torch.no_grad():
        exact = model(x)
        assert (convert(gm)(x) - exact).norm() <= 0.03 * exact.norm()


class Map(torch.nn.Module):
    """A norm of maps (B, H, W, C), whose result a linear reads as tokens and another operator as it is."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(x)
        return self.linear(y.flatten(1, 2)).unflatten(1, (2, 3)) + y.permute(0, 2, 1, 3).permute(0, 2, 1, 3)


def test_a_norm_of_maps_is_fused_with_its_quantization():
    x = normal(4, 2, 3, 8)
    gm = convert(
        calibrate(prepare(Map(), (x,), QuantConfig(smoothing=None, outputs=OutputQuantization())), [x], progress=False)
    )
    fused = fuse(gm)
    assert fused.graph.find_nodes(op="call_function", target=ops.norm_quantize.default)
    with torch.no_grad():
        assert (fused(x) - gm(x)).abs().max() <= 0.01 * gm(x).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_trained_models_keep_their_accuracy(name):
    """The k-scaled paper loses up to 1.2 points; one digit of 450 is 0.22."""
    from ptq4vm.data import calibration_batches, loader, open_dataset, transform_for
    from ptq4vm.evaluate import evaluate

    model = timm.create_model(name, pretrained=True).eval().requires_grad_(False)
    transform = transform_for(model)
    test = list(loader(open_dataset("digits", "test", transform), 150))
    images = calibration_batches(open_dataset("digits", "train", transform), 64, 32, 0)
    gm = convert(calibrate(prepare(model, (images[0],), KSCALED), images, progress=False))
    exact, ours = (evaluate(module, test, progress=False).top1 for module in (model, gm))
    assert ours >= exact - 1.2
    if name == "vim_nano_patch4_32":
        logits, errors = model(test[0][0]), []
        for quantized in (gm, convert(calibrate(prepare(model, (images[0],), NAIVE), images, progress=False))):
            errors.append((quantized(test[0][0]) - logits).norm().item())
        assert errors[0] < 0.5 * errors[1]


class Scan(torch.nn.Module):
    """A scan over (B, L, E) with some of its optional terms."""

    def __init__(self, terms: str) -> None:
        super().__init__()
        self.terms = terms
        self.A, self.D, self.bias = (torch.nn.Parameter(-normal(*shape).abs()) for shape in ((4, 3), (4,), (4,)))

    def forward(self, u):
        values = {"D": self.D, "z": 2 * u, "B": self.bias}
        optional = [value if name in self.terms else None for name, value in values.items()]
        B, C = u[..., :3] + 1, u[..., 1:] - 1
        return ops.selective_scan(u, u / 2, self.A, B, C, *optional, "softplus" in self.terms)


@pytest.mark.parametrize("terms", ["", "D", "z", "B", "softplus", "DzB softplus"])
def test_a_scan_taken_apart_computes_what_it_did(terms):
    model, u = Scan(terms).eval(), normal(2, 5, 4, seed=1)
    gm = decompose_fused_ops(canonicalize(capture(model, (u,))))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    torch.testing.assert_close(gm(u), model(u), rtol=1e-5, atol=1e-6)
    (scan,) = gm.graph.find_nodes(op="call_function", target=ops.selective_scan.default)
    assert scan.args[5:] == (None, None, None, False)
