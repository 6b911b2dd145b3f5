"""Data: sources, tokenizers, packing, mixing, and the exact position in all of them.

`open_data` (in `data_pipeline.open`) turns a `DataConfig` into a training and a validation set;
`Loader` (in `data_pipeline.loader`) reads the training set in an order that is a pure function of
the seed and the global sample index. Nothing here imports torch before data is opened.
"""

from core.registry import load_from

load_from("source", "data_pipeline.sources")
load_from("tokenizer", "data_pipeline.tokenizers")
load_from("augmentation", "data_pipeline.augment")
