from data_pipeline.tokenizers.byte_level import ByteTokenizer


def test_bytes_that_are_not_text_decode_to_a_mark() -> None:
    assert ByteTokenizer().decode([0xFF, 65]) == "�A"


def test_ids_are_bytes() -> None:
    assert ByteTokenizer().encode("aé") == [97, 0xC3, 0xA9]
