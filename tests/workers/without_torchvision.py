"""Run pytest as if torchvision were not installed.

python tests/workers/without_torchvision.py tests/model/test_parity.py ...
"""

import os
import sys


os.environ["WITHOUT_TORCHVISION"] = "1"  # for the processes that tests start
sys.modules["torchvision"] = None  # `find_spec` gives None and an import fails; transformers looks when it is imported

import pytest  # noqa: E402


sys.exit(pytest.main(sys.argv[1:]))
