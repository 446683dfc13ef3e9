"""Settings for tests and benchmarks of the CUDA sampler, beside those of `cases`."""

from .cases import SampleCase

# Over several blocks, in vocabularies that are and are not a multiple of four.
CORRECTNESS = [
    SampleCase(4099, temperature=0.0, presence_penalty=1.5, repetition_penalty=1.3),
    SampleCase(5000, temperature=0.7, top_k=20, top_p=0.95),
    SampleCase(4099, temperature=1.0, top_k=20),
    SampleCase(5000, temperature=1.0, top_p=0.9),
    SampleCase(5000, temperature=2.0, top_k=300, top_p=0.5, min_p=0.01),
    SampleCase(4099, 0.7, 40, 0.8, 0.1, 1.5, 1.1),
]
# Few tokens are kept, all about as likely: one more or less soon shows in the draws.
EXACT_CUT = [
    SampleCase(1000, temperature=1000.0, top_k=5),
    SampleCase(50, temperature=1000.0, top_p=0.1),
    SampleCase(5000, temperature=1000.0, top_p=0.001),
    SampleCase(5000, temperature=1000.0, top_k=50, top_p=0.1),
]
# Where more tokens than a block sorts lie about the cut: the logits are few distinct values, or nearly one.
CROWDED = [
    SampleCase(6000, temperature=1.0, top_p=0.7),
    SampleCase(6000, temperature=1.0, top_k=2600),
    SampleCase(6000, temperature=1.0, top_k=2600, top_p=0.7),
    SampleCase(6000, temperature=1e4, top_k=4000, top_p=0.4),
    SampleCase(6000, temperature=1e-4, top_k=4000, top_p=0.4),
]
BENCHMARK = [
    SampleCase(248320, temperature=0.0),
    SampleCase(248320, temperature=0.7, top_k=20, top_p=0.95),
    SampleCase(248320, temperature=1.0, top_p=0.95),
    SampleCase(248320, temperature=1.0),
    SampleCase(248320, 0.7, 20, 0.8, 0.0, 1.5, 1.0),
    SampleCase(248320, temperature=1e4, top_p=0.5),
]
