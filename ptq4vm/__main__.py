import sys

from ptq4vm.cli import main

sys.exit(main())
