from hybrid_scale.model import digests


def test_a_large_file_is_told_by_its_samples(tmp_path, monkeypatch):
    """Any change in a sampled block is seen; 64 blocks of 4 bytes here, in 1,000."""
    monkeypatch.setattr(digests, "WHOLE_BYTES", 100)
    monkeypatch.setattr(digests, "SAMPLE_BYTES", 4)
    path = tmp_path / "w.bin"
    path.write_bytes(bytes(1000))
    before = digests._sampled(path)
    for place, seen in ((0, True), (999, True), (7, False)):
        path.write_bytes(bytes(place) + b"\1" + bytes(999 - place))
        assert (digests._sampled(path) != before) is seen
