"""`python -m ls_vision` is the command `ls-vision`."""
from ls_vision.cli import main

if __name__ == '__main__':
    main()
