"""Studies: a question that takes many trials, each written down as soon as it is done, and a page that answers it.

`recforge study KIND RECIPE [flags]` finds the kind in `command.KINDS` and gives it the recipe's name and the flags. To
add a kind:

1. One line in `command.KINDS`: its help and `module:function`, which takes `argv` and returns an exit status. Nothing
   that is imported before the flags are read may import torch.
2. Flags: a frozen dataclass of its own settings, and one that inherits `StudyConfig` and holds them without a prefix,
   so that every flag of `recforge train` is there too; `flags.read_flags` makes it from `argv` and the recipe::

       @dataclass(frozen=True, kw_only=True)
       class CurvatureConfig(StudyConfig):
           study: tyro.conf.OmitArgPrefixes[CurvatureSettings] = field(default_factory=CurvatureSettings)

       asked = read_flags("curvature", CurvatureConfig, argv, description="...")   # None: a usage was printed

3. Trials: each is a function without arguments that returns what JSON can hold. `StudyFolder` calls it once, ever::

       with StudyFolder(asked.folder, kind="curvature", settings=asked.settings(), total=12) as study:
           record = study.trial("spectrum/probe-3", lambda: {"ritz": [...]})

   A trial that is recorded is not computed again, so killing the command and repeating it goes on where it was. Random
   numbers must therefore be a function of the trial's name, not of what was drawn before. Large arrays go to a file of
   `study.folder`, before the record that says that they are there.
4. `trial_run.TrialRunner` trains one `RunConfig` with the real `Trainer`; it, too, goes on from its last checkpoint.
5. A page: a template that extends `study.html` and fills its block `main`; `page.write_study_page` does the rest.
"""
