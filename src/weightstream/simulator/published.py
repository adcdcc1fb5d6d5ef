"""Published figures of the clusters that this one is modelled on, as data, with their sources and what we assume of them.

Rows are never tuned: one of them calibrates the efficiency inside a layer, all others are predicted with it.
"""

from dataclasses import dataclass
from typing import Literal

Quantity = Literal["samples per second", "scaling efficiency", "I/O seconds per direction and step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure, and the job whose simulation it is held against.

    Args:
        tolerance: relative.
        workers: systems; for a scaling efficiency, of the larger cluster.
        base: systems of the smaller one.
        each: sequences of one system.
        calibrates: this row is what the efficiency comes from.
        otherwise: what explains it, should it not be met.
    """

    name: str
    quantity: Quantity
    published: float
    source: str
    model: str
    cluster: str
    workers: int
    each: float
    sequence: int
    assumes: str
    base: int = 1
    tolerance: float = 0.1
    calibrates: bool = False
    otherwise: str = ""


_WEAK = "each system has the same batch in both clusters (weak scaling)"
_FLOOR = (
    "bytes of a simulated step down to one system, over its link; 16 bits of each parameter twice a step, forward and "
    "backward, are the 32 bits"
)
GPT_J_ONE = Figure(
    name="GPT-J 6B, 1 CS-2, batch 66 × 2,048", quantity="samples per second",
    published=19.8,  # and 1.59 PFLOP/s: Cerebras, GPT-J on one CS-2; reference, section 1
    source="vendor's GPT-J benchmark", model="gpt-j-6b", cluster="cs-2", workers=1, each=66, sequence=2048,
    assumes="the efficiency inside a layer is calibrated on this row", calibrates=True,
)  # fmt: skip
FIGURES: tuple[Figure, ...] = (
    GPT_J_ONE,
    Figure(
        name="GPT-J 6B, 2 CS-2, batch 120 × 2,048", quantity="samples per second",
        published=43.7,  # the same benchmark
        source="vendor's GPT-J benchmark", model="gpt-j-6b", cluster="cs-2", workers=2, each=60, sequence=2048,
        assumes="the batch of 120 is of both systems together",
        otherwise="the published figure is more than twice that of one system: its software became faster in between",
    ),
    Figure(
        name="GenSLM, 2 to 4 CS-2", quantity="scaling efficiency",
        published=4.1 / 2.4 / 2,  # hours of a whole training on 2 and on 4
        source="Zvyagin et al. 2022, bioRxiv 10.1101/2022.10.10.511571", model="genslm-1.3b", cluster="cs-2",
        workers=4, base=2, each=13, sequence=10240,
        assumes=_WEAK + "; the model is the 1.3B one; 13 sequences each are as many tokens as in the GPT-J row",
        otherwise="hours of a whole training hold what no step holds (start, compilation, validation): 0.7 h that do not "
        "shrink would explain all of it, and such a constant is not part of the simulation",
    ),
    Figure(
        name="GenSLM 1.3B, 4 to 16 CS-2", quantity="scaling efficiency",
        published=10.4 / 2.7 / 4,  # hours of a whole training on 4 and on 16
        source="Zvyagin et al. 2022, bioRxiv 10.1101/2022.10.10.511571", model="genslm-1.3b", cluster="cs-2",
        workers=16, base=4, each=13, sequence=10240,
        assumes=_WEAK + "; 13 sequences each are as many tokens as in the GPT-J row",
    ),
    *(
        Figure(
            name=f"Cerebras-GPT {size}, weak scaling to 16 CS-2", quantity="scaling efficiency",
            published=1.0, tolerance=0.09,  # "linear within 9%": arXiv:2304.03208
            source="Dey et al. 2023, arXiv:2304.03208", model=f"cerebras-gpt-{size.lower()}", cluster="cs-2",
            # a sixteenth of the batch that the model card gives for the size
            workers=16, each=batch / 16, sequence=2048, assumes=_WEAK + ", a sixteenth of the model card's batch",
        )
        for size, batch in (("111M", 120), ("1.3B", 528), ("13B", 1080))
    ),
    Figure(
        name="1T parameters, 1 to 16 CS-3", quantity="scaling efficiency",
        published=15.3 / 16,  # Sandia and Cerebras, 2024-12-10
        source="Sandia National Laboratories and Cerebras, NeurIPS 2024", model="1t", cluster="cs-3", workers=16, each=8,
        sequence=2048,
        assumes=_WEAK + ", 8 sequences of 2,048 (neither the shape of the model nor its batch was published)",
    ),
    *(
        Figure(
            name=f"I/O floor of {model.upper().removeprefix('GPT3-')} at 32 bits and 150 GB/s",
            quantity="I/O seconds per direction and step", published=parameters * 4 / 150e9,  # arithmetic on the two
            source="white paper on weight streaming: 32 bits per parameter, direction and iteration; CS-2 data sheet: 1.2 Tb/s",
            model=model, cluster="cs-2", workers=1, each=1, sequence=2048, assumes=_FLOOR,
        )
        for model, parameters in (("gpt3-175b", 175e9), ("1t", 1e12), ("120t", 120e12))
    ),
)  # fmt: skip
