import sys

from .commands.lasting import Lasting
from .commands.main import main

if __name__ == "__main__":
    sys.stderr = Lasting(sys.stderr)
    sys.exit(main())
