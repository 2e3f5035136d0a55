"""Rung 1: what every kernel computes, in Triton's interpreter, against its reference (SQNR in dB)."""

# fp16 outputs carry 11 bits: rounding noise alone is 73 dB below the signal; one code wrong by one in a hundred is 50.
FP16_DB = 70
FLOAT32_DB = 110


def test_every_kernel_equals_its_reference(interpreted):
    assert len(interpreted) > 20
    for name, found in interpreted.items():
        if found is True or found is False:
            assert found, name
        else:
            rounded = name.startswith(("w2", "w3", "w4", "w8 ")) or "rounded" in name
            assert found >= (FP16_DB if rounded else FLOAT32_DB), f"{name}: {found:.1f} dB"
