"""Which tokens are used for what."""

import pytest
import torch

from kvferry.calibration.windows import digest, split_text


def test_windows_do_not_share_tokens_and_keep_the_order_of_the_text():
    documents = [torch.arange(1000), torch.arange(1000, 1090), torch.arange(2000, 2450)]
    windows = split_text(documents, 100, windows=5, held_out=2)
    assert windows.moments.shape == (5, 100)
    assert windows.held_out.shape == windows.unseen.shape == (2, 100)
    everything = torch.cat((windows.moments, windows.held_out, windows.unseen))
    assert everything.unique().numel() == everything.numel()
    assert int(windows.moments.max()) < int(windows.held_out.min())
    assert int(windows.held_out.max()) < int(windows.unseen.min())
    for window in everything:
        assert window.diff().eq(1).all()  # none crosses a document's end


def test_all_windows_are_used_where_the_text_is_just_long_enough():
    windows = split_text([torch.arange(99)], 11, windows=3, held_out=3)
    assert torch.cat((windows.moments, windows.held_out, windows.unseen)).flatten().equal(torch.arange(99))


@pytest.mark.parametrize("documents", [[], [torch.arange(10)], [torch.arange(399)], [torch.arange(199)] * 3])
def test_too_short_a_text_is_refused(documents):
    with pytest.raises(ValueError, match=r"windows of 100 tokens .* 4 are needed: give a longer text"):
        split_text(documents, 100, windows=2, held_out=1)


def test_digests_tell_texts_apart():
    assert digest(torch.arange(9)) == digest(torch.arange(4), torch.arange(4, 9))
    assert digest(torch.arange(9)) != digest(torch.arange(8))
