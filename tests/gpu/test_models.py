"""Whole models on a GPU: moved, fused, compiled, recorded as CUDA graphs."""

import copy

import pytest
import torch
from helpers.strategies import normal

pytest.importorskip("torchao", reason="models are quantized with torchao")
pytest.importorskip("timm", reason="models are made with timm")


import ptq4vm
from benchmarks.speed.graphs import copied, recorded
from ptq4vm.backend.dynamo import ptq4vm_backend
from ptq4vm.config import QuantConfig
from ptq4vm.quantization_specs import Granularity, RangeSearch

pytestmark = pytest.mark.gpu

CONFIGS = {
    "W8A8": QuantConfig(),
    "W4A4": QuantConfig(weights={"bits": 4}, activations={"bits": 4}),
    "W4A4, rotated": QuantConfig(weights={"bits": 4}, activations={"bits": 4}, rotation=True),
    "per tensor": QuantConfig(activations={"granularity": Granularity.PER_TENSOR}),
    "dynamic": QuantConfig(activations={"granularity": Granularity.PER_TOKEN_DYNAMIC}, range_search=RangeSearch.MINMAX),
}


@pytest.fixture(scope="module")
def small_vmamba():
    from ptq4vm.models import VMamba

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VMamba(num_classes=10, embed_dim=24, depths=(1, 1)).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.classifier.head.weight.copy_(normal(*model.classifier.head.weight.shape, seed=3))
    return model


@pytest.fixture(scope="module")
def models(small_vim, small_vmamba):
    """Lowered models on the CPU by config, and images for them; made once."""
    made = {}

    def model(family, config):
        key = family, config
        if key not in made:
            float_model, side = (small_vim, 16) if family == "vim" else (small_vmamba, 32)
            images = normal(12, 3, side, side, seed=4)
            with torch.inference_mode(False):
                prepared = ptq4vm.prepare(float_model, (images[:2],), CONFIGS[config])
                made[key] = ptq4vm.convert(ptq4vm.calibrate(prepared, images.split(5), progress=False)), images
        return made[key]

    return model


def close(ours, theirs, limit=0.02):
    """A code that moves by one at a rounding tie moves all that follows a little."""
    return float((ours.cpu() - theirs).norm() / theirs.norm()) <= limit


BOTH = pytest.mark.parametrize("family", ["vim", "vmamba"])
EVERY = pytest.mark.parametrize(
    ("family", "config"), [*(("vim", config) for config in CONFIGS), ("vmamba", "W8A8"), ("vmamba", "W4A4, rotated")]
)


@EVERY
@torch.inference_mode()
def test_a_model_that_is_moved_computes_the_same(device, models, family, config):
    quantized, images = models(family, config)
    want = quantized(images)
    there, inputs = copy.deepcopy(quantized).to(device), images.to(device)
    assert close(there(inputs), want)
    assert close(ptq4vm.fuse(there)(inputs), want)
    half = {"activations": torch.bfloat16}
    assert close(ptq4vm.fuse(there, **half)(inputs), ptq4vm.fuse(quantized, **half)(images), 0.05)
    assert close(ptq4vm.fuse(quantized).to(device)(inputs), want)  # fused before it is moved
    assert close(ptq4vm.fuse(there).to("cpu")(images), want)
    assert all(value.device.type == device.type for value in there.state_dict().values())


@BOTH
@torch.inference_mode()
def test_a_second_gpu_gives_the_same_bits(device, second_device, models, family):
    quantized, images = models(family, "W8A8")
    gpus = device, second_device
    logits = [ptq4vm.fuse(copy.deepcopy(quantized).to(gpu))(images.to(gpu)).cpu() for gpu in gpus]
    assert torch.equal(*logits)


@pytest.mark.parametrize("options", [{"inductor": False}, {}], ids=["fused alone", "with Inductor"])
@BOTH
def test_a_model_is_compiled_where_it_is(device, models, family, options):
    if device.type == "cpu" and not options:
        pytest.skip("tests/test_backend.py does that")
    quantized, images = models(family, "W8A8")
    there = copy.deepcopy(quantized).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(there, backend=ptq4vm_backend, fullgraph=True, options=options)
    with torch.inference_mode():
        for count in (1, 12, 7):
            assert close(compiled(images[:count].to(device)), quantized(images[:count]))


@EVERY
@torch.inference_mode()
def test_a_recorded_model_takes_new_images(device, models, family, config):
    """A fused model starts nothing that a CUDA graph cannot hold, and reads its inputs anew."""
    quantized, images = models(family, config)
    fast, batches = ptq4vm.fuse(copy.deepcopy(quantized).to(device)), images.to(device).split(4)
    again = recorded(fast, batches[0])
    found = [copied(again(batch)) for batch in batches]
    assert all(torch.equal(ours, fast(batch)) for ours, batch in zip(found, batches, strict=True))
    assert not torch.equal(found[0], found[1])


@torch.inference_mode()
def test_three_streams_run_a_model_at_once(streams, models):
    quantized, images = models("vim", "W8A8")
    fast, batches = ptq4vm.fuse(copy.deepcopy(quantized).to(streams)), images.to(streams).split(4)
    want = [fast(batch) for batch in batches]
    own = [torch.cuda.Stream(streams) for _ in batches]
    torch.cuda.synchronize(streams)
    for _ in range(10):
        found = []
        for stream, batch in zip(own, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(fast(batch))
        torch.cuda.synchronize(streams)
        assert all(map(torch.equal, found, want))
