"""What became of a step, in words and numbers.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
report.py             ``qg.explain``, ``qg.report``
check.py              ``qg.check``: one step compiled, beside eager ones
runs.py               eager runs of a step on copies
reach.py              everything that a step reaches, by name
copies.py             copies that leave the original alone
perturbed.py          an eager run whose results are off by their rounding
compared.py           what is compared of a tensor
judgement.py          whether rounding explains a difference
plain_text.py         tables as text
====================  =================================================================================================
"""
