"""Simulated device with known latencies of a form that no predictor assumes.

Matrix products follow a roofline whose compute rate depends on the shape (whole tiles, and caches
that a wide input exceeds). Attention is computed block by block and slows down once the keys exceed
a cache. Small calls pay for operators and threads, and long runs throttle slightly. Each
architecture has a deviation of about 1 % that no feature explains, and each measurement has noise.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from flash.arch import ArchSpec, Attention, Choices, FfnChoices, SearchSpace, SpaceSettings
from flash.device.workload import Phase, Point
from flash.lowering.settings import AttentionForm, LoweringSettings, SlidingForm

BACKBONE = ArchSpec(
    model_dim=2048,
    ffn_dim=8192,
    layer_types=(Attention.full_attention,) * 16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=202048,
)
FLASH = SearchSpace(
    SpaceSettings(
        name="flash",
        num_layers=Choices(min=10, max=16),
        model_dim=Choices(min=1024, max=2048, step=128),
        ffn_dim=FfnChoices(min=2048, max=8192, step=256),
    ),
    BACKBONE,
)
SMALL = ArchSpec(
    model_dim=256,
    ffn_dim=576,
    layer_types=(Attention.full_attention,) * 8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=2048,
    sliding_window=128,
)
TINY = SearchSpace(
    SpaceSettings(
        name="tiny",
        num_layers=Choices(min=4, max=8),
        model_dim=Choices(min=128, max=256, step=32),
        ffn_dim=FfnChoices(min=192, max=576, step=64),
    ),
    SMALL,
)
LOWERING = LoweringSettings(max_context=2304)
SDPA = replace(LOWERING, attention=AttentionForm.sdpa, prefill_chunk=1024, prefill_last_only=False)
PREFILL_512, PREFILL_2048 = Point(Phase.prefill, 512), Point(Phase.prefill, 2048)
DECODE_512 = Point(Phase.decode, 512)
POINTS = (PREFILL_512, PREFILL_2048, DECODE_512)


@dataclass(frozen=True, kw_only=True)
class SimulatedDevice:
    """Simulated latencies of whole models [ms]; rates are per ms."""

    gemm: float = 9e7
    stream: float = 1.1e7
    attention: float = 1.2e7
    products: float = 3.5e7
    elements: float = 6e5
    operator_ms: float = 0.002
    quirk: float = 0.01
    noise: float = 0.025

    def truth(self, specs, point, lowering=LOWERING):
        """Compute the latencies without measurement noise [ms]."""
        return np.array([self._one(spec, point, lowering) for spec in specs])

    def measure(self, specs, point, rng, lowering=LOWERING):
        """Measure each once [ms]; noise only adds time, and is large now and then."""
        noise = self.noise * rng.standard_normal(len(specs))
        return self.truth(specs, point, lowering) * np.exp(noise)

    def _one(self, spec, point, lowering):
        decode = point.phase is Phase.decode
        total, start, left = 0.0, point.tokens if decode else 0, 1 if decode else point.tokens
        while left:
            length = min(left, lowering.chunk)
            total += self._call(spec, start, length, lowering)
            start, left = start + length, left - length
        digest = hashlib.sha256(spec.to_json().encode()).digest()
        quirk = (int.from_bytes(digest[:4], "big") / 2**32 - 0.5) * np.sqrt(12) * self.quirk
        throttled = 1 + 0.02 * total / (total + 5000)
        return total * throttled * np.exp(quirk)

    def _call(self, spec, start, length, lowering):
        d, f = spec.model_dim, spec.ffn_dim
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        ffn = 2 * self._product(length, d, f) + self._product(length, f, d)
        ffn += length * (7 * f + 5 * d) / self.elements / 5 + 10 * self.operator_ms
        one = 2 * self._product(1, d, f) + self._product(1, f, d) + 10 * self.operator_ms
        total = 0.03
        attending = [i for i, kind in enumerate(spec.layer_types) if kind.attends]
        for i, kind in enumerate(spec.layer_types):
            tail = lowering.prefill_last_only and length > 1 and not any(j > i for j in attending)
            if kind is not Attention.skip_attention:
                total += 2 * self._product(length, d, kv) + 22 * self.operator_ms
                asked = 1 if tail else length
                total += self._product(asked, d, q) + self._product(asked, q, d)
                total += length * (5 * d + 6 * (q + kv)) / self.elements / 5
                first = start + length - asked
                total += self._attend(spec, kind, first, asked, lowering)
            total += one if tail else ffn
        group = spec.num_heads // spec.num_kv_heads
        products = lowering.attention is AttentionForm.matmul and length > 1
        if Attention.full_attention in spec.layer_types and products:
            total += length * (start + length) * group / self.elements / 2
        if (
            Attention.sliding_attention in spec.layer_types
            and lowering.sliding is SlidingForm.stock
        ):
            hidden = length * lowering.slots(spec.sliding_window) / self.elements
            total += hidden * group if products else 3 * hidden / 5
        return total + self._product(1, d, spec.vocab_size)

    def _product(self, rows, inner, outer):
        """Time a product in whole tiles of 8 outputs x 4 rows; deep inner sizes are slower."""
        tiles = 4 * -(-rows // 4) * 8 * -(-outer // 8) * inner
        rate = self.gemm * min(1.0, rows / 4) / (1 + 40 / inner + (inner / 12000) ** 2)
        return max(tiles / rate, 0.57 * inner * outer / self.stream)

    def _attend(self, spec, kind, start, length, lowering):
        """Time attention with queries in blocks of 32 and keys in blocks of 128."""
        window = spec.sliding_window
        sliding = kind is Attention.sliding_attention
        firsts = np.arange(start, start + length, 32)
        stock = lowering.sliding is SlidingForm.stock
        matmul = length > 1 and lowering.attention is AttentionForm.matmul
        if matmul and (not sliding or stock):
            seen = start + length
            if sliding and lowering.slots(window) < lowering.max_context:
                seen = lowering.slots(window)
            pairs = length * seen
            copied = 6 * seen * spec.num_kv_heads * spec.head_dim
            products = 2 * pairs * spec.num_heads * spec.head_dim / self.products
            return products + pairs * spec.num_heads / self.elements + copied / self.stream
        if not sliding:
            keys = np.minimum(firsts + 32, start + length)
        elif not stock:
            keys = np.minimum(firsts + 32, 2 * window if length > 1 else window)
        else:
            keys = np.full(len(firsts), lowering.slots(window))
        keys = 128 * -(-keys // 128)
        rows = min(length, 32)
        far = 1 + 0.5 * (keys.sum() / len(keys)) / 4096
        operations = 2 * rows * keys.sum() * spec.num_heads * spec.head_dim
        bytes_read = 8 * keys.sum() * spec.num_kv_heads * spec.head_dim / (8 if length > 1 else 1)
        return far * operations / self.attention + bytes_read / (0.5 * self.stream)
