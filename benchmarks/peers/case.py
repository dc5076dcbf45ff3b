"""One case of the comparison: a model, its data and how many processes train it.

Every system of a case has the same samples in the same batches, the same first weights and the same rules:
Adagrad for dense weights; for rows ``rowwise_adagrad``, one accumulator for w and one, the mean of g^2, for
v_1..v_k, or ``adagrad``, one for every number.

Dims: G samples of the global batch, b = G / N of one worker's home, F fields, R rows of each field's table,
J lookups per field and sample, k factors, K numbers per row, U unique rows of a home slice.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

GATE_STEPS = 20
"""Steps before systems are compared for equality; they warm up what is timed later, too."""

DEEP = ("wide_deep", "deepfm", "dcn", "dlrm")
LINEAR = ("lr", "fm", "wide_deep", "deepfm")
CROSS_LAYERS = 3
"""Of dcn."""

MODELS = ("lr", "fm", "wide_deep", "deepfm", "dcn", "dlrm")

ROWS_RATE, DENSE_RATE, EPS = 0.002, 0.0002, 1e-6
"""Small steps, and an eps: Adagrad's first step is the gradient's sign, so gradients that all but cancel, of which
there are many among so many weights, would else step by their rounding errors."""
SEED = 7


@dataclass(frozen=True)
class Part:
    """Columns of a row that one library table holds: ``width`` of them used, padded to a multiple of four.

    The row's accumulator is the mean over the padded width, so its rate and eps are those of the narrow row
    times sqrt(width / padded): the same steps.
    """

    name: str
    width: int

    @property
    def padded(self) -> int:
        """FBGEMM's tables have a multiple of four columns."""
        return -(-self.width // 4) * 4

    @property
    def scale(self) -> float:
        """Factor of rate and eps for the padded mean of squares."""
        return float((self.width / self.padded) ** 0.5)


@dataclass(frozen=True)
class Case:
    """What is trained, on what, by how many; hashable, and one line of JSON to a worker."""

    model: str = "deepfm"
    hidden: tuple[int, ...] = (256, 128)
    factors: int = 16
    fields: int = 26
    table_rows: int = 1_000_000
    bag: int = 1
    zipf: float = 1.05
    batch: int = 8192
    """Samples of the global batch, G."""
    workers: int = 2
    rule: str = "rowwise_adagrad"
    exchange: str = "auto"
    """What DES may choose from."""
    fill: bool = False
    """Whether all rows of DES are live before it starts; other tables always are."""
    link: str = "loopback"
    batches: int = 0
    """Global batches of the data file."""

    def __post_init__(self) -> None:
        if self.bag > 1 and self.model in ("fm", "deepfm"):
            # DES counts pairs inside a bag too; pooled vectors, which are all that peers exchange, cannot tell them.
            raise ValueError(f"{self.model} with bags of {self.bag} is another model to the peers; use wide_deep")
        if self.batch % self.workers:
            raise ValueError(f"a global batch of {self.batch} does not divide among {self.workers} workers")

    @classmethod
    def parse(cls, text: str) -> Case:
        """A case from its line of JSON."""
        fields = json.loads(text)
        return cls(**fields | {"hidden": tuple(fields["hidden"])})

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @property
    def home(self) -> int:
        """Samples at home on one worker, b."""
        return self.batch // self.workers

    @property
    def linear(self) -> int:
        """1 where the model has a linear term, and rows hold a w in front."""
        return int(self.model in LINEAR)

    @property
    def vector(self) -> int:
        """Factors per row, 0 for lr."""
        return 0 if self.model == "lr" else self.factors

    @property
    def width(self) -> int:
        """Numbers per row that the model reads, K."""
        return self.linear + self.vector

    @property
    def init(self) -> float:
        """Standard deviation of first factors, so that the pairs' sum starts with one of about 0.7."""
        pairs = self.fields * (self.fields - 1) / 2
        return float((0.5 / (pairs * self.factors)) ** 0.25)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Library tables per field: those columns that share an accumulator."""
        if self.rule == "adagrad":
            return (Part("row", self.width),)
        both = (Part("w", self.linear), Part("v", self.vector))
        return tuple(part for part in both if part.width)

    @property
    def name(self) -> str:
        """The model in a table's cell: deepfm-256."""
        return f"{self.model}-{self.hidden[0]}" if self.model in DEEP else self.model
