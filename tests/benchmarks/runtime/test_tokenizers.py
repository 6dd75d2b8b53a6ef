import resource

import pytest

from benchmarks.runtime.tokenizers import save_tokenizer
from tests.helpers import hub_folders


def test_a_tokenizer_that_does_not_fit_on_the_disk_is_an_error_of_the_disk(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match=f"the tokenizer cannot be written to {tmp_path}: File "):
            save_tokenizer(hub_folders.tokenizer(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
