"""``python -m zsvr_kernels`` prints what this installation is made of."""

import sys

from zsvr_kernels.build_info import build_info

sys.stdout.write(f"{build_info()}\n")
