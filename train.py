"""`python train.py --config=gla:tiny --workdir=runs/gla`: see zoo/train.py, or --help."""

from zoo.train import run

if __name__ == "__main__":
    run()
