"""``python -m vllm_osdt.cli``."""

import sys

from vllm_osdt.cli import main

sys.exit(main())
