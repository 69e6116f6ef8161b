"""Children that end with the process that started them, for notebooks and for the cells of a grid."""

import ctypes
import signal
import sys
from functools import partial

# In the child: Linux ends it when its parent is killed (1: PR_SET_PDEATHSIG).
END_WITH_PARENT = partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL) if sys.platform == "linux" else None
