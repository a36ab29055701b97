import sys

from .commands.lasting import Lasting
from .commands.main import main

if __name__ == "__main__":
    # Without a console there is none.
    if sys.stderr is not None:
        sys.stderr = Lasting(sys.stderr)
    sys.exit(main())
