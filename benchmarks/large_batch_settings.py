"""What is compared: the logs, the one small-batch setting of each, and every way to go from it to a large batch.

The numbers are those that `benchmarks.large_batch --tune` found on validation rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from benchmarks.large_batch_arms import Arm, Log, Settings, apply_rules, searched
from dlrm.config import ModelConfig
from dlrm.training.batch_growth_config import BatchGrowthConfig

LogName = Literal["synthetic", "movielens-100k"]
SMALL = "small_batch"

LOGS: dict[LogName, Log] = {
    # In the order of time, as the log drifts and comes by once, like that of a running service.
    "synthetic": Log(model=ModelConfig(dim=8, bottom=(32,), top=(64, 32)), batch_size=256, epochs=1, shuffle=False),
    "movielens-100k": Log(
        model=ModelConfig(dim=8, bottom=(), top=(64,), interaction="dcn", cross_layers=1, cross_rank=16, dropout=0.3),
        batch_size=64,
        epochs=3,
        shuffle=True,
    ),
}

SYNTHETIC_SMALL = Settings(
    dense="adam",
    tables="adam",
    dense_rate=0.002,
    tables_rate=0.03,
    eps=1e-3,
    init_scale=0.1,
    end_factor=0.1,
    dense_warmup_steps=40,
    tables_warmup_steps=40,
)
# Two were tuned; the validation rows chose that with row-wise Adagrad (.8242, .8232). The other is there to be scaled.
SYNTHETIC_ADAM = searched(
    1,
    SYNTHETIC_SMALL,
    dense_rate=0.00344,
    tables_rate=0.0136,
    eps=6.96e-4,
    init_scale=0.0826,
    dense_warmup_steps=22.8,
    tables_warmup_steps=123,
)
SYNTHETIC_BASE = searched(
    1,
    replace(SYNTHETIC_SMALL, tables="rowwise_adagrad", tables_rate=1.0, eps=0.02),
    dense_rate=0.00344,
    tables_rate=0.56,
    eps=0.0139,
    init_scale=0.0826,
    dense_warmup_steps=22.8,
    tables_warmup_steps=107,
)
# Found by hand, as starts of searches: row-wise Adagrad with an eps as large as the gradients of rare rows.
SYNTHETIC_16X = Settings(
    dense="lamb",
    tables="rowwise_adagrad",
    dense_rate=0.02,
    tables_rate=1.0,
    eps=2e-3,
    init_scale=0.15,
    end_factor=0.1,
    dense_warmup_steps=10,
    tables_warmup_steps=10,
)
SYNTHETIC_4X = replace(
    SYNTHETIC_16X,
    dense="adam",
    dense_rate=0.007,
    tables_rate=0.7,
    eps=5e-3,
    init_scale=0.1,
    dense_warmup_steps=12,
    tables_warmup_steps=60,
)
ROW_ADAM_16X: dict[str, Any] = {"tables": "adam", "tables_rate": 0.1, "eps": 1e-4}
COWCLIP_16X: dict[str, Any] = {"tables": "cowclip", "tables_rate": 0.06, "eps": 1e-4, "clip": 1e-3, "l2": 1e-6}

MOVIELENS_SMALL = replace(SYNTHETIC_SMALL, dense_rate=3e-4, tables_rate=0.003, init_scale=0.01)
MOVIELENS_BASE = searched(
    1,
    MOVIELENS_SMALL,
    dense_rate=2.81e-4,
    tables_rate=0.00143,
    eps=7.7e-4,
    init_scale=0.0129,
    end_factor=0.0748,
    dense_warmup_steps=52.1,
    tables_warmup_steps=19.9,
)
MOVIELENS_16X = replace(
    MOVIELENS_SMALL,
    tables="rowwise_adagrad",
    dense_rate=0.002,
    tables_rate=0.1,
    eps=3e-3,
    dense_warmup_steps=10,
    tables_warmup_steps=10,
)

# The same trial of all three searches was the best; with LAMB, at a rate as many times its start.
MOVIELENS_FOUND: dict[str, Any] = {"dense_rate": 0.00173, "init_scale": 0.00659, "dense_warmup_steps": 12.7}

ADAM_ADAGRAD_16X = searched(
    16,
    replace(SYNTHETIC_16X, dense="adam", dense_rate=0.008),
    dense_rate=0.0138,
    tables_rate=0.56,
    eps=0.00139,
    init_scale=0.124,
    end_factor=0.1,
    dense_warmup_steps=5.7,
    tables_warmup_steps=26.7,
)

LAMB_ADAGRAD_16X = searched(
    16,
    SYNTHETIC_16X,
    dense_rate=0.0379,
    tables_rate=0.48,
    eps=0.00139,
    init_scale=0.107,
    end_factor=0.0574,
    dense_warmup_steps=5.7,
    tables_warmup_steps=26.7,
)
# A search with one seed found warm-ups that are too short for others: AUC of the validation rows with seeds 0, 1, 2 is
# .8200, .8123, .8199 as found, and .8199, .8204, .8201 with more than twice as many steps; with 100, .8119 and .8195.
STEADY_STEPS = 60
BEST_16X = replace(ADAM_ADAGRAD_16X.settings, tables_warmup_steps=STEADY_STEPS)

ARMS: dict[LogName, dict[str, Arm]] = {
    "synthetic": {
        SMALL: SYNTHETIC_BASE,
        **apply_rules(SYNTHETIC_BASE.settings, 16, ("unscaled", "sqrt", "rare")),
        **apply_rules(SYNTHETIC_ADAM.settings, 16, ("sqrt",), kind="_adam"),
        "adam_adam_16x": searched(
            16,
            replace(SYNTHETIC_16X, dense="adam", dense_rate=0.008, **ROW_ADAM_16X),
            dense_rate=0.0131,
            tables_rate=0.0602,
            eps=0.00018,
            init_scale=0.107,
            end_factor=0.164,
            dense_warmup_steps=31,
            tables_warmup_steps=38.5,
        ),
        "adam_adagrad_16x": ADAM_ADAGRAD_16X,
        "adam_adagrad_steady_16x": Arm(factor=16, settings=BEST_16X),
        "adam_cowclip_16x": searched(
            16,
            replace(SYNTHETIC_16X, dense="adam", dense_rate=0.013, **COWCLIP_16X),
            dense_rate=0.0136,
            eps=5.17e-5,
            end_factor=0.127,
            dense_warmup_steps=11.5,
            clip=2.47e-4,
            l2=1.5e-6,
        ),
        "lamb_adam_16x": searched(
            16,
            replace(SYNTHETIC_16X, **ROW_ADAM_16X),
            dense_rate=0.0344,
            tables_rate=0.0566,
            eps=4.26e-05,
            init_scale=0.141,
            end_factor=0.1,
            dense_warmup_steps=11.3,
            tables_warmup_steps=40,
        ),
        "lamb_adagrad_16x": LAMB_ADAGRAD_16X,
        "lamb_adagrad_steady_16x": Arm(
            factor=16, settings=replace(LAMB_ADAGRAD_16X.settings, tables_warmup_steps=STEADY_STEPS)
        ),
        "lamb_lamb_16x": searched(
            16,
            replace(SYNTHETIC_16X, tables="lamb", tables_rate=0.05, eps=1e-6),
            dense_rate=0.0328,
            tables_rate=0.0371,
            init_scale=0.213,
            end_factor=0.0341,
            dense_warmup_steps=10.3,
            tables_warmup_steps=31,
        ),
        "without_tables_warmup_16x": Arm(factor=16, settings=replace(BEST_16X, tables_warmup_steps=0)),
        "without_eps_rule_16x": Arm(factor=16, settings=replace(BEST_16X, eps=SYNTHETIC_BASE.settings.eps)),
        "short_rows_16x": Arm(factor=16, settings=replace(BEST_16X, init_scale=0.03)),
        "growth_16x": Arm(factor=16, settings=SYNTHETIC_BASE.settings, growth=BatchGrowthConfig(test="norm")),
        "recipe_16x": Arm(factor=16, settings=SYNTHETIC_BASE.settings, is_recipe=True),
        **apply_rules(SYNTHETIC_BASE.settings, 4, ("unscaled",)),
        "adam_adagrad_4x": searched(
            4,
            SYNTHETIC_4X,
            dense_rate=0.012,
            tables_rate=0.392,
            eps=3.48e-3,
            init_scale=0.0826,
            dense_warmup_steps=6.84,
            tables_warmup_steps=160,
        ),
        "recipe_4x": Arm(factor=4, settings=SYNTHETIC_BASE.settings, is_recipe=True),
    },
    "movielens-100k": {
        SMALL: MOVIELENS_BASE,
        **apply_rules(MOVIELENS_BASE.settings, 16, ("unscaled", "sqrt")),
        "adam_adam_16x": searched(
            16,
            replace(MOVIELENS_16X, tables="adam", tables_rate=0.006, eps=6e-5),
            tables_rate=0.00776,
            **MOVIELENS_FOUND,
        ),
        "adam_adagrad_16x": searched(16, MOVIELENS_16X, tables_rate=0.129, **MOVIELENS_FOUND),
        "lamb_adagrad_16x": searched(
            16,
            replace(MOVIELENS_16X, dense="lamb", dense_rate=0.01),
            tables_rate=0.129,
            **MOVIELENS_FOUND | {"dense_rate": 0.00865},
        ),
        "recipe_16x": Arm(factor=16, settings=MOVIELENS_BASE.settings, is_recipe=True),
    },
}
