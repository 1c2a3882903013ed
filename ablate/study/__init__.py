"""Studies: which trials there are, who runs them, and what becomes of each.

folder.py      the study's folder: study.json, its lock, where its runs are      (no torch)
trial.py       one config, checked as a whole, and the key that names its run
space.py       grids, arms, seeds and searches turned into cells
tune.py        learning rates: the fits of a first stage                         (no torch)
prepare.py     the text and the cost of a config, before anything runs
store.py       the Optuna study that mirrors the run folders and proposes searches
supervisor.py  the process that hands trials to children and records what became of them
child.py       the process that trains one trial
progress.py    what the user sees meanwhile
status.py      states of a study's trials, from its files alone                  (no torch)
rerun.py       one trial trained again and compared
"""
