"""``python -m zsvr`` is the command line."""

from zsvr.cli import main

raise SystemExit(main())
