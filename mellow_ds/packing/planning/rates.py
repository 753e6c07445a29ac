"""What reading costs, as measured, for `mellow-shards plan`: put new numbers here when a benchmark has them."""

# Examples a CPU-second from shard to batch tensors, of two 10 s clips, tokenization left out. By codec.
# One core of an AMD EPYC (AVX2), November 2026, by benchmarks/data_stream.py: benchmarks/results/data_stream.json.
EXAMPLES_PER_CPU_SECOND = {"flac": 108.0, "opus": 11.7, "pcm": 1_995.0, "features": 7_692.0}
REFERENCE_CLIP_SECONDS = 20.0  # of audio in such an example
REFERENCE_CLIPS = 2

# Measured by benchmarks/plan_check.py on the same machine.
# The rest of an example: JSON of its clip, tokens, collating.
TEXT_SECONDS = 0.0004
# The way of a batch from a loader process to the trainer, in the loader's CPU time: into a slot of shared memory.
TRANSFER_SECONDS_A_MEGABYTE = 0.002
TRANSFER_SECONDS_A_BATCH = 0.002
# From the start of the stream to loader processes that work: Python and torch imported once, in the fork server.
WORKER_START_SECONDS = 4.0
# To read a shard's index, check its hash and sort its keys, when it is first touched.
INDEX_SECONDS = 0.002
# To read a shard's line of the manifest and look at its size, at the start.
SHARD_START_SECONDS = 0.00005

# Bytes of a clip by those of its 16-bit PCM at 32 kHz mono. flac: everyday sound (854 of 1,283 kB a pair of clips);
# opus: about 64 kbit/s of 512.
BYTES_OF_PCM = {"flac": 0.67, "opus": 0.125, "pcm": 1.0}
FEATURE_CROP_BYTES = 2 * (768 + 32 * 527)  # of a window through HTSAT, half precision
SAMPLE_BYTES = 2_048  # tar headers, padding and the JSON without its questions
QUESTION_BYTES = 350  # of a question in the JSON
