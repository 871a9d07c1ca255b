"""Files that were edited, forged or made for harm are refused, or the edit changes nothing."""

import pickle
import random

import pytest
import torch
from helpers.forgery import forged
from helpers.portable_models import CONFIG, quantized_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ptq4vm
from ptq4vm import QuantConfig, load, save
from ptq4vm.serialization.model_file import CheckpointError, dumps, loads


@pytest.fixture(scope="module")
def small():
    """Returns the file of a small model, with inputs and outputs."""
    quantized, inputs = quantized_model("raw")
    return dumps(quantized), inputs, quantized(*inputs)


def test_a_forger_who_changes_nothing_is_not_refused(small):
    data, inputs, outputs = small
    assert torch.equal(loads(forged(data, lambda content, tensors: None))(*inputs), outputs)


@given(st.integers(0, 2**31))
def test_any_edit_of_the_bytes_is_refused_or_without_effect(small, seed):
    data, inputs, outputs = small
    draw = random.Random(seed)
    edited = bytearray(data)
    place = draw.randrange(len(edited))
    kind = draw.choice(["flip", "cut", "insert", "delete", "swap"])
    if kind == "flip":
        edited[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del edited[place:]
    elif kind == "insert":
        edited[place:place] = draw.randbytes(draw.randrange(1, 9))
    elif kind == "delete":
        del edited[place : place + draw.randrange(1, 9)]
    else:
        other = draw.randrange(len(edited))
        edited[place], edited[other] = edited[other], edited[place]
    try:
        loaded = loads(bytes(edited))
    except CheckpointError:
        return
    assert torch.equal(loaded(*inputs), outputs)


def test_every_bit_of_the_tensors_and_every_fact_of_the_graph_is_verified(small):
    data, _, _ = small
    body = 8 + int.from_bytes(data[:8], "little")
    places = [body, len(data) - 1, *range(body, len(data), max(1, (len(data) - body) // 20))]
    edits = [data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] for place in places]
    for fact, other in ((rb"aten::mul.Tensor", rb"aten::add.Tensor"), (rb"aten::tanh.default", rb"aten::sinh.default")):
        assert fact in data
        edits.append(data.replace(fact, other, 1))
    for edited in edits:
        with pytest.raises(CheckpointError, match="its SHA-256 differs"):
            loads(edited)


def first_call(content):
    return next(entry for entry in content["graph"]["nodes"] if "call" in entry)


def set_call(name, *args):
    def change(content, tensors):
        first_call(content).update(call=name, args=list(args))

    return change


def update_node(**entries):
    return lambda content, tensors: first_call(content).update(entries)


def update_graph(**entries):
    return lambda content, tensors: content["graph"].update(entries)


def rename_tensor(name):
    def change(content, tensors):
        old = next(iter(tensors))
        tensors[name] = tensors.pop(old)
        for entry in content["graph"]["nodes"]:
            if entry.get("tensor") == old:
                entry["tensor"] = name

    return change


def spoil(ending, value):
    def change(content, tensors):
        name = next(name for name in tensors if name.endswith(ending))
        tensors[name] = torch.full_like(tensors[name], value)

    return change


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


REFUSED = {
    "opens a file": (
        set_call("aten::from_file.default", "/etc/passwd"),
        "from_file.default is refused: it reaches files",
    ),
    "writes": (set_call("aten::add_.Tensor", {"node": "x"}, {"node": "x"}), r"add_\.Tensor is refused: it changes"),
    "no tensor operator": (set_call("aten::save.default", {"node": "x"}, "f"), "is refused: it is not an operator on"),
    "another library": (set_call("evil::run.default"), r"operators=\['evil::run\.default'\]"),
    "profiler": (set_call("profiler::_record_function_enter.default", "x"), "is not one of aten's or ptq4vm's"),
    "sets the instruction set": (
        set_call("ptq4vm::_use_isa.default", "portable"),
        "is refused: it is run for a side effect",
    ),
    "python": (set_call("builtins.eval", "1"), "'builtins.eval' is not the name of an operator"),
    "os.system": (set_call("os::system", "true"), "is not the name of an operator"),
    "a method": (update_node(call=None), "is not the name of an operator"),
    "unknown": (set_call("aten::nothing.default"), "aten::nothing.default is not defined here"),
    "too many arguments": (set_call("aten::neg.default", {"node": "x"}, 1), "takes 1 arguments, not 2"),
    "a text for a tensor": (set_call("aten::neg.default", "x"), "takes Tensor as self, not 'x'"),
    "a float for an int": (set_call("aten::select.int", {"node": "x"}, 0.5, 0), "takes int as dim, not 0.5"),
    "an unknown argument": (
        update_node(call="aten::neg.default", args=[{"node": "x"}], kwargs={"out": {"node": "x"}}),
        "has no argument out",
    ),
    "a text for a number": (set_call("operator.pow", {"node": "x"}, "2"), "takes nodes and numbers"),
    "code as an argument's name": (update_node(kwargs={"a=print(1)": 1}), "cannot be the name of an argument"),
    "code as a node's name": (update_node(name="x); print(1"), "cannot be the name of a node"),
    "a keyword as a node's name": (update_node(name="import"), "cannot be the name of a node"),
    "a name twice": (update_node(name="x"), "two nodes are called x|cannot be the name"),
    "a later node": (set_call("aten::neg.default", {"node": "output"}), "is read before it is computed"),
    "an unknown kind": (set_call("aten::neg.default", {"module": "os"}), "is no argument"),
    "an unknown type": (set_call("aten::to.dtype", {"node": "x"}, {"dtype": "load"}), "'load' is no dtype"),
    "an unknown device": (set_call("aten::neg.default", {"device": "meta"}), "'meta' is no device"),
    "a long text": (set_call("aten::gelu.default", {"node": "x"}, "n" * 2000), "a text of 2000 characters"),
    "a large number": (set_call("aten::select.int", {"node": "x"}, 2**70, 0), "more than 64 bits"),
    "deep nesting": (set_call("aten::neg.default", deep(400)), "corrupt|takes Tensor"),
    "code as a class's name": (update_graph(name="A(print)"), "cannot be the name of a model"),
    "code as an input": (update_graph(arguments=["x=print(1)"]), "cannot be the name of an argument"),
    "no nodes": (update_graph(nodes=3), "corrupt"),
    "no output": (update_graph(output={"node": "y"}), "is read before it is computed"),
    "more outputs": (update_graph(output=[{"node": "x"}, {"node": "x"}]), "inputs, names and outputs are"),
    "another structure": (update_graph(input_structure=None), "corrupt"),
    "an unknown structure": (
        update_graph(output_structure={"kind": "deque", "items": []}),
        "corrupt|no structure",
    ),
    "no shape": (lambda c, t: c["graph"]["inputs"][0].update(shape=["batch", -3]), "is no shape of an input"),
    "a scope out of range": (update_node(scope=10**9), "corrupt"),
    "code as a tensor's name": (rename_tensor('a"); print(1); ("'), "cannot be the name of a tensor"),
    "a tensor in place of forward": (rename_tensor("forward"), "corrupt"),
    "a tensor in a class": (rename_tensor("__class__.x"), "corrupt"),
    "a missing tensor": (lambda c, t: t.pop(next(iter(t))), "there is no tensor"),
    "an alias of nothing": (lambda c, t: c["tensors"]["aliases"].update(a="nothing"), "there is no tensor nothing"),
    "axes out of order": (lambda c, t: c["tensors"]["dim_orders"].update({next(iter(t)): [5, 5]}), "corrupt"),
    "a scale that is not finite": (spoil("weight_scale", float("inf")), "scales are finite and positive"),
    "a scale of zero": (spoil("input_scale", 0.0), "scales are finite and positive"),
    "a negative scale": (spoil("input_inv_scale", -1.0), "scales are finite and positive"),
    "a zero point out of range": (spoil("zero_point", 128), "zero points lie between -128 and 127"),
    "scales of another type": (
        lambda c, t: t.update({k: v.double() for k, v in t.items() if k.endswith("weight_scale")}),
        "scales are float32",
    ),
    "an unknown key of the config": (
        lambda c, t: c["model"]["quantization_config"]["config"].update(weight=4),
        "has no key 'weight'",
    ),
    "no linears": (lambda c, t: c["model"]["quantization_config"].pop("linears"), "corrupt"),
    "a newer version": (
        lambda c, t: c.update(format_version=4, ptq4vm_version="9.9"),
        "written by ptq4vm '9.9'.*upgrade",
    ),
    "no version": (lambda c, t: c.update(format_version="new"), "upgrade ptq4vm"),
    "no model": (lambda c, t: c.pop("model"), "corrupt"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_with_a_right_digest_is_refused_by_name(small, what):
    change, message = REFUSED[what]
    data = forged(small[0], change)
    with pytest.raises(CheckpointError, match=message):
        loads(data)


@torch.library.custom_op("portable_models::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


twice.register_fake(torch.empty_like)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return twice(self.fc(x))


def test_an_operator_of_the_users_own_is_allowed_by_name_alone(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    quantized = ptq4vm.quantize(Custom().eval(), [x], QuantConfig(**CONFIG), progress=False)
    folder = save(quantized, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"load\(folder, operators=\['portable_models::twice\.default'\]\)"):
        load(folder)
    assert torch.equal(load(folder, operators=["portable_models::twice.default"])(x), quantized(x))
    assert torch.equal(pickle.loads(pickle.dumps(quantized))(x), quantized(x))


def test_what_a_file_cannot_hold_is_refused_when_it_is_saved(tmp_path):
    x = torch.randn(4, 5, 8)
    quantized = ptq4vm.quantize(Custom().eval(), [x], QuantConfig(**CONFIG), progress=False)
    (node,) = (node for node in quantized.graph.nodes if node.target is torch.ops.portable_models.twice.default)
    node.target, node.args = torch.ops.aten.add_.Tensor, (*node.args, 1)
    quantized.recompile()
    with pytest.raises(ValueError, match=r"twice: the operator aten::add_\.Tensor cannot be written: it changes"):
        save(quantized, tmp_path / "model")
    assert not (tmp_path / "model").exists()
