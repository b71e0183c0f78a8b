"""The quantization schemes: names, sizes and limits. Imports no torch, so that a plan needs none.

A form is how one weight is stored, a scheme the forms of a model's linears. `quantized_linear.py`
has the module of each form.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama.distributed.sharding import Sizes, rank_counts, rank_shapes

TILE = 16  # rows of a weight in groups or in blocks that lie together
# Rows that are quantized or dequantized at a time: at common widths they fit the processor's cache.
BLOCK = 512
# Weights in blocks, see blocks.py: columns that share a scale, and the most columns of a block.
BLOCK_GROUP, MOST_COLUMNS = 32, 256
GROUPS = (32, 64, 128)  # columns that share a scale in the older int4
# Up to this many scores, the arithmetic of attention is the reference's (scores in the model's
# dtype, softmax in fp32), so that a seed draws the same ids as in Meta's code. More scores would
# take over 64 MB in fp32; torch's fused kernel, which does not store them, is used instead.
EXACT_SCORES = 1 << 24


@dataclass(frozen=True)
class Form:
    """How a weight is stored.

    Attributes:
        kind: "rows", one scale a row (`Int8Linear`); "groups", a scale and a zero in bf16 for each
            group of columns (`Int4Linear`); "blocks", see blocks.py (`BlockLinear`).
        bits: of a code.
        group: columns that share a scale, of "groups".
    """

    kind: str
    bits: int
    group: int = BLOCK_GROUP

    def bytes(self, rows: int, columns: int) -> int:
        """Of a weight: codes, scales and zeros."""
        if self.kind == "rows":
            return rows * (columns + 4)
        padded = -(-rows // TILE) * TILE
        if self.kind == "groups":
            return padded * (columns // 2 + columns // self.group * 4)
        each = block_columns(columns)
        return padded // TILE * (columns // each) * block_bytes(self.bits, each)

    def check(self, columns: int) -> None:
        """Raise a ValueError if a weight with so many columns cannot be stored like this."""
        if self.kind == "blocks":
            block_columns(columns)
        elif self.kind == "groups" and columns % self.group:
            raise ValueError(
                f"groups of {self.group} do not divide {columns} columns; use another of {GROUPS}, "
                "or int8"
            )

    def unit(self, columns: int) -> int:
        """Columns that ranks cannot share, of a weight with so many on all ranks together."""
        if self.kind == "rows":
            return 1
        return block_columns(columns) if self.kind == "blocks" else self.group


@dataclass(frozen=True)
class Scheme:
    """The forms of a model's linears.

    Attributes:
        name: as users write it.
        layers, output: forms of the linears of the layers, and of the output layer.
        entry: of params.json, beside "tied".
    """

    name: str
    layers: Form
    output: Form

    def form(self, linear: str) -> Form:
        """Of a linear, such as "layers.0.attention.wq"."""
        return self.output if linear.startswith("output") else self.layers

    @property
    def is_old(self) -> bool:
        """Whether `llama3 quantize` writes another form under this name now."""
        return self.layers.kind == "groups"

    def words(self) -> str:
        """For reports, such as "int4, the output in 6 bits"."""
        group = f" in groups of {self.layers.group}" if self.is_old else ""
        output = "" if self.output == self.layers else f", the output in {self.output.bits} bits"
        return f"{self.name}{group}{output}"


INT8 = Form("rows", 8)
SCHEMES = {
    scheme.name: scheme
    for scheme in (Scheme("int8", INT8, INT8), Scheme("int4", Form("blocks", 4), Form("blocks", 6)))
}


def old_int4(group: int = 32) -> Scheme:
    """The first form of int4, which stored checkpoints can have.

    Raises:
        ValueError: there were no groups of this size.
    """
    if type(group) is not int or group not in GROUPS:
        raise ValueError(f"groups of {group!r} weights are not possible; use one of {GROUPS}")
    return Scheme("int4", Form("groups", 4, group), INT8)


def check_scheme(name: object) -> None:
    """Raise a ValueError unless there is this scheme."""
    if not isinstance(name, str) or name not in SCHEMES:
        raise ValueError(f"unknown scheme {name!r}; use one of {list(SCHEMES)}")


def find_scheme(scheme: Scheme | str) -> Scheme:
    """The scheme of a name.

    Raises:
        ValueError: there is none.
    """
    if isinstance(scheme, Scheme):
        return scheme
    check_scheme(scheme)
    return SCHEMES[scheme]


def undivided(args: Sizes, ranks: int, form: Form) -> dict[str, tuple[int, int]]:
    """{name: (columns of a rank, columns that ranks cannot share)} of the first layer's matrices
    that ranks cannot share in this form.
    """
    whole, found = rank_shapes(args, 1), {}
    for name, shape in rank_shapes(args, ranks).items():
        if len(shape) == 2 and name.startswith("layers."):
            try:
                unit = form.unit(whole[name][1])
            except ValueError:
                unit = form.group
            if shape[1] % unit:
                found[name] = shape[1], unit
    return found


def possible_ranks(args: Sizes, scheme: Scheme | None = None) -> list[int]:
    """`rank_counts`, without those that would split columns which ranks cannot share."""
    counts = rank_counts(args)
    return [n for n in counts if scheme is None or not undivided(args, n, scheme.layers)]


def block_columns(columns: int) -> int:
    """Columns of each block of a weight with so many: the most that divide them.

    Raises:
        ValueError: not even a group does.
    """
    for each in range(MOST_COLUMNS, 0, -BLOCK_GROUP):
        if columns and columns % each == 0:
            return each
    raise ValueError(f"groups of {BLOCK_GROUP} do not divide {columns} columns; use int8")


def block_bytes(bits: int, columns: int) -> int:
    """Bytes of a block of 16 rows: two numbers of 16 bits a row; groups; codes."""
    groups = columns // BLOCK_GROUP
    return TILE * (4 + groups + -(-groups // 2) + columns * bits // 8)


LAYOUTS = {
    block_bytes(bits, columns): (bits, columns)
    for bits in (4, 6)
    for columns in range(BLOCK_GROUP, MOST_COLUMNS + 1, BLOCK_GROUP)
}


def block_layout(size: int) -> tuple[int, int]:
    """(bits of a code, columns) of a block of `size` bytes, which tells them apart.

    Raises:
        ValueError: there is no such block.
    """
    if size not in LAYOUTS:
        raise ValueError(f"no block has {size} bytes; quantize the model again")
    return LAYOUTS[size]
