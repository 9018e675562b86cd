"""How far a metric can be relied on: what an audit measured of it, as a card, and the badge that tables show.

An audit scores the SAEs of a suite again and again: on evaluation text and splits drawn anew, at snapshots of their
training, in other batches, numbers, contexts, amounts of tokens and units. Seven questions are asked of each metric,
that is of each (metric, eval, version, parameters), each in a module of its own that has the formulas:

noise            how far it moves when the evaluation is drawn anew, and which difference one run can show
training_noise   how much of its variance is the training seed
order            whether it ranks oracle > trained > frozen decoder, random and permuted decoder
progress         whether it rises with the tokens an SAE was trained on
truth            whether it ranks SAEs as agreement with known features does (arXiv 2602.14687)
invariance       what moves it that should not
cost             seconds and bytes

`rows` reads what was measured, `cards` puts the answers together, `verdicts` says what tables show of them, and `files`
keeps them. All is pure NumPy on one table, so that a card can be made again without any model. Values of a metric that
is better when small are turned round before they are ranked.
"""
