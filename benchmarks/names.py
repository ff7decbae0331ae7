"""What workloads and phases are called in tables and plots."""

ABOUT = {
    "tiny": "MLP 10-10-1, batch 32",
    "mlp": "MLP 784-1024-1024-10, batch 1024",
    "cnn": "CNN 32x32, batch 128",
    "xception": "Xception 71x71, batch 16",
    "encoder": "Transformer encoder, batch 32 x 64 tokens",
    "words": "Transformer with 8k-word output, batch 16 x 64 tokens",
    "embedding": "Embedding 200k x 64, batch 1024",
}

SPEED_UP_OF = ("cnn", "xception", "encoder")
BESIDE_MIRRORED = ("tiny", "mlp", "cnn", "xception", "words", "embedding")

SIDE_BY_SIDE = "towers, side by side"
ALONE = "one tower alone"
UPDATE = "weight update"
MERGE = "cut, merge, hand over"
NOTHING = "no operation (Python, waiting)"
PHASES = (SIDE_BY_SIDE, ALONE, UPDATE, MERGE, NOTHING)
