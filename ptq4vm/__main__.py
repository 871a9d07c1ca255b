import sys

from ptq4vm.cli.main import main

sys.exit(main())
