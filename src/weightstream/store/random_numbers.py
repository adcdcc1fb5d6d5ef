"""Random numbers that depend on (seed, name, draw, index) and nothing else, with the same bits on every machine.

The words come from Philox 4x64 with ten rounds (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011),
whose counter is the element index. Everything after that uses +, -, ×, ÷ and square root in fp64 alone, which IEEE 754
rounds correctly, and never through a library's logarithm or a fused multiply-add, which differ between machines.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Each Philox block of four 64-bit words serves eight elements.
BLOCK_ELEMENTS = 8

# Coefficients of algorithm AS 241, PPND16 (Wichura, "The Percentage Points of the Normal Distribution", Applied
# Statistics 37, 1988), constant term first: numerator, denominator. Relative accuracy about 1e-16.
_CENTRE = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
_MIDDLE = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip
_FAR = (
    (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
     2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
)  # fmt: skip

# log(1 + f) as in fdlibm's e_log.c (Sun Microsystems, 1993).
_LOG = (6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01,
        1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860511658591e-01)  # fmt: skip
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10


class Words:
    """The random words of one draw of one parameter; element i has word i, however it is asked for."""

    def __init__(self, seed: int, name: str, draw: int) -> None:
        digest = hashlib.sha256(f"weightstream initial values\0{seed}\0{name}".encode()).digest()
        self._key = int.from_bytes(digest[:16], "little")
        self._draw = draw
        self._next = -1
        self._philox: np.random.Philox | None = None

    def take(self, start: int, count: int) -> NDArray[np.uint32]:
        """32 bits for each of the elements [start, start + count); `start` is a multiple of `BLOCK_ELEMENTS`."""
        block, blocks = start // BLOCK_ELEMENTS, -(-count // BLOCK_ELEMENTS)
        if self._philox is None or self._next != block:
            # The counter's low half is the block, its top word the draw: streams never meet. (numpy counts up
            # before it makes a block, so block 0 has counter 1.)
            self._philox = np.random.Philox(counter=block + (self._draw << 192), key=self._key)
        self._next = block + blocks
        words = np.asarray(self._philox.random_raw(4 * blocks), dtype="<u8")
        return words.view("<u4")[:count]


def uniform(words: NDArray[np.uint32]) -> Floats:
    """(k + 1/2) / 2**32: symmetric about one half and never 0 or 1, exact in fp64."""
    values = np.multiply(words, 2.0**-32, dtype=np.float64)
    values += 2.0**-33
    return values


def normal(words: NDArray[np.uint32]) -> Floats:
    """Standard normal values by inversion; at most 6.3 from zero, as 32 bits are."""
    values = np.multiply(words, 2.0**-32, dtype=np.float64)
    values += 2.0**-33 - 0.5
    return probit(values)


def probit(centred: Floats) -> Floats:
    """The normal quantile of `centred + 1/2`, in place; infinite at the ends.

    Source: algorithm AS 241, PPND16. `centred` runs from -1/2 to 1/2.
    """
    distance = np.abs(centred)
    tails = np.flatnonzero(distance > 0.425)
    outer = centred[tails]
    np.multiply(centred, centred, out=distance)
    np.subtract(0.180625, distance, out=distance)
    centred *= _ratio(distance, _CENTRE)
    if tails.size:
        centred[tails] = _probit_tail(outer)
    return centred


def _probit_tail(centred: Floats) -> Floats:
    radius = np.abs(centred)
    np.subtract(0.5, radius, out=radius)
    ends = radius <= 0.0
    if ends.any():
        radius[ends] = 0.25
    radius = log(radius)
    np.negative(radius, out=radius)
    np.sqrt(radius, out=radius)
    far = np.flatnonzero(radius > 5.0)
    values = _ratio(radius - 1.6, _MIDDLE)
    if far.size:
        values[far] = _ratio(radius[far] - 5.0, _FAR)
    if ends.any():
        values[ends] = np.inf
    return np.copysign(values, centred)


def erfinv(values: Floats) -> Floats:
    """The inverse of the error function: the normal quantile of (1 + x) / 2, divided by the root of two."""
    halved = values * 0.5
    outside = np.abs(halved) > 0.5
    result = probit(halved)
    result *= 0.70710678118654752440
    if outside.any():
        result[outside] = np.nan
    return result


def log(values: Floats) -> Floats:
    """The natural logarithm, within one unit in the last place; as usual at zero and below."""
    special = ~((values > 0.0) & (values < np.inf))
    unusual = bool(special.any())
    mantissa, exponent = np.frexp(np.where(special, 1.0, values) if unusual else values)
    low = mantissa < 0.70710678118654752440
    # Double the low ones, so that what follows is within a root of two of one.
    mantissa += np.where(low, mantissa, 0.0)
    k = exponent.astype(np.float64)
    k -= low
    f = mantissa
    f -= 1.0
    s = f / (f + 2.0)
    z = s * s
    series = z * _LOG[6]
    for coefficient in reversed(_LOG[:6]):
        series += coefficient
        series *= z
    half = f * f
    half *= 0.5
    series += half
    series *= s
    series += k * _LN2_LOW
    half -= series
    half -= f
    k *= _LN2_HIGH
    k -= half
    if unusual:
        given = values[special]
        k[special] = np.where(given == 0.0, -np.inf, np.where(given > 0.0, given, np.nan))
    return k


def _ratio(x: Floats, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Floats:
    """A polynomial over another by Horner's rule, each product and each sum rounded."""
    over, under = (_polynomial(x, side) for side in coefficients)
    over /= under
    return over


def _polynomial(x: Floats, coefficients: tuple[float, ...]) -> Floats:
    value = x * coefficients[-1]
    for coefficient in reversed(coefficients[1:-1]):
        value += coefficient
        value *= x
    value += coefficients[0]
    return value
