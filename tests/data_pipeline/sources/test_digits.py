import numpy as np

from data_pipeline.sources.digits import SklearnDigits


def test_digits() -> None:
    source = SklearnDigits()
    assert len(source.labels()) == 1797 and source.classes() == [str(d) for d in range(10)]
    assert source.read(0).shape == (8, 8, 1) and source.read(0).dtype == np.uint8
    assert max(int(source.read(i).max()) for i in range(50)) == 255
    assert source.fingerprint() == SklearnDigits().fingerprint()
