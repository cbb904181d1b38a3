"""The loop from people's feedback to a better model: `python -m examples.feedback`.

endpoint.py   the model that is talked to: any OpenAI-compatible server (`transformers serve`, vLLM)
talk.py       a conversation in the terminal, with like, dislike and rewrite
page.py       the same in a browser: Gradio's chat
port.py       is the page's port free, and who has it?
store.py      what people said, in SQLite, one transaction each
pairs.py      preference pairs out of it, in TRL's format
rounds.py     one round: pairs, reward model (TRL), policy (fastppo), round.json
simulate.py   raters made of a rule, who try the loop without people
"""
