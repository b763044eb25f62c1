"""summary: shapes of what runs, sizes of what is drawn, operations counted by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from functorch_gen import models, nn, random, tree
from functorch_gen.transforms import ShapeDtypeStruct, scan
from functorch_gen.typing import Key, Layer, Params

NET = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(torch.relu, nn.Linear(4, 2)))


def struct(*shape: int, dtype: torch.dtype = torch.float32) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(shape, dtype, torch.device("cpu"))


def test_summary_is_a_table() -> None:
    assert str(nn.summary(NET, struct(5, 3))) == (
        "name         layer  output  params  flops\n"
        "0           Linear  (5, 4)      16    120\n"
        "1      BatchNorm1d  (5, 4)       8      0\n"
        "2       Sequential  (5, 2)      10     80\n"
        "2.0       Function  (5, 4)       0      0\n"
        "2.1         Linear  (5, 2)      10     80\n"
        "total   Sequential  (5, 2)      34    200"
    )


def test_summary_has_rows_to_read() -> None:
    table = nn.summary(NET, struct(5, 3), train=True)
    assert table.rows[0] == nn.SummaryRow("0", "Linear", struct(5, 4), 16, 2 * 5 * 3 * 4)
    assert [row.name for row in table.rows] == ["0", "1", "2", "2.0", "2.1"]
    assert (table.total.params, table.total.flops) == (34, 200)


# The layer, its inputs, and the multiply-adds written out.
COUNTS: list[tuple[str, Any, tuple[Any, ...], int]] = [
    ("linear of a vector", nn.Linear(3, 4), (struct(3),), 3 * 4),
    ("linear of a vector, no bias", nn.Linear(3, 4, bias=False), (struct(3),), 3 * 4),
    ("linear of a batch of sequences", nn.Linear(3, 4), (struct(2, 5, 3),), 2 * 5 * 3 * 4),
    ("convolution", nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (struct(2, 4, 8, 8),), 2 * 6 * 16 * 2 * 9),
    ("transposed", nn.ConvTranspose1d(3, 5, 4, stride=2), (struct(2, 3, 6),), 2 * 3 * 6 * 5 * 4),
    ("perceptron", nn.MLP(3, (8, 7), 2), (struct(5, 3),), 5 * (3 * 8 + 8 * 7 + 7 * 2)),
    ("gated", nn.GatedMLP(3, 8, 2), (struct(5, 3),), 5 * (3 * 8 + 3 * 8 + 8 * 2)),
    ("attention", nn.MultiHeadAttention(8, 2), (struct(2, 5, 8),), 2 * (5 * 8 * 32 + 2 * 5 * 5 * 8)),
    (
        "cross-attention of other sizes",
        nn.MultiHeadAttention(8, 2, kdim=3, vdim=6),
        (struct(5, 8), struct(7, 3), struct(7, 6)),
        5 * 8 * 8 + 7 * 3 * 8 + 7 * 6 * 8 + 2 * 5 * 7 * 8 + 5 * 8 * 8,
    ),
    ("recurrent", nn.LSTM(3, 4), (struct(5, 6, 3),), 5 * 6 * 16 * (3 + 4)),
    ("embedding", nn.Embedding(9, 4), (struct(5, dtype=torch.int64),), 0),
]


@pytest.mark.parametrize(("layer", "inputs", "products"), [row[1:] for row in COUNTS], ids=[row[0] for row in COUNTS])
def test_summary_counts_two_operations_for_each_product(layer: Any, inputs: tuple[Any, ...], products: int) -> None:
    table = nn.summary(layer, *inputs)
    assert table.total.flops == 2 * products
    assert table.total.params == tree.size(layer.init(random.key(0)))


def test_summary_of_gpt_adds_up() -> None:
    """The blocks' operations, the logits', and each parameter once."""
    e, length, vocab, layers = 8, 6, 11, 2
    gpt = models.GPT(vocab, 6, layers, num_heads=2, embed_dim=e)
    table = nn.summary(gpt, struct(3, length, dtype=torch.int64))
    rows = {row.name: row for row in table.rows}
    block = 3 * 2 * (length * e * 4 * e + 2 * length * length * e + 8 * length * e * e)
    assert rows["block0"].flops == rows["block1"].flops == block
    assert table.total.flops == layers * block + 3 * 2 * length * e * vocab
    assert (
        table.total.params
        == tree.size(gpt.init(random.key(0)))
        == sum(rows[name].params for name in ("tokens", "positions", "block0", "block1", "norm"))
    )
    for name in ("block0.attention", "block1.mlp", "block1.mlp.2"):
        sized = gpt.init(random.key(0))
        for part in name.split("."):
            sized = sized[part]
        assert rows[name].params == tree.size(sized)


@dataclass(frozen=True)
class Composite:
    """A linear layer, called as ``fun`` says."""

    fun: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]

    @property
    def parts(self) -> dict[str, Layer]:
        return {"linear": nn.Linear(3, 3)}

    def init(self, key: Key) -> Params:
        return nn.init_parts(self.parts, key)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        return self.fun(nn.Bound(self.parts, params, key=key).linear, x)


def test_summary_adds_the_calls_of_one_sublayer() -> None:
    (row,) = nn.summary(Composite(lambda linear, x: linear(linear(x)[:2])), struct(5, 3)).rows
    assert row == nn.SummaryRow("linear", "Linear", struct(2, 3), 12, 2 * 9 * (5 + 2))


def test_summary_counts_each_step_of_a_loop() -> None:
    loop = Composite(lambda linear, x: scan(lambda h, _: (linear(h), None), x, length=7)[0])
    assert nn.summary(loop, struct(5, 3)).total.flops == 7 * 2 * 5 * 9


def test_summary_takes_no_memory_and_computes_nothing() -> None:
    """Ten terabytes of parameters; a layer that reads a value would fail on what has none."""
    table = nn.summary(nn.Sequential(nn.Linear(10**6, 10**6), torch.relu), struct(10**6, 10**6))
    assert table.total.params == 10**12 + 10**6
    assert table.total.flops == 2 * 10**18


def test_summary_takes_tensors_keys_and_options() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    assert nn.summary(net, torch.ones(2, 3), key=random.key(0)).total.output == struct(2, 4)
    attention = nn.MultiHeadAttention(8, 2)
    assert nn.summary(attention, struct(2, 5, 8), is_causal=True).total.output == struct(2, 5, 8)


def test_summary_shows_outputs_that_are_trees() -> None:
    table = nn.summary(nn.LSTM(3, 4), struct(5, 6, 3))
    assert "((5, 6, 4), ((1, 5, 4), (1, 5, 4)))" in str(table)


def test_summary_leaves_nothing_behind_after_an_error() -> None:
    with pytest.raises(ValueError, match="Linear: x: expected shape"):
        nn.summary(NET, struct(5, 2))
    net, x = nn.Sequential(torch.relu), torch.ones(2)
    assert nn.capture(net, "*")({}, x)[1].keys() == {"0"}
    assert type(net({}, x)) is Tensor


def test_summary_without_inputs_lists_the_parameters():
    net = models.ResNet(1, 10, (1,), (4,), "cifar")
    table = nn.summary(net)
    expected = {name: tuple(x.shape) for name, x in tree.names(net.init(random.key(0))).items()}
    assert {row.name: row.output.shape for row in table.rows} == expected
    assert table.total.params == sum(torch.Size(shape).numel() for shape in expected.values())
    assert "layer1.0.conv1.weight" in str(table)
