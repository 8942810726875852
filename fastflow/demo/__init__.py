"""The demonstration of fastflow on real data: the UCI handwritten digits.

`fastflow.demo.digits` holds the data, the flow model and the reward; `fastflow.demo.run` the rollout; `fastflow.demo.report`
what it writes. Importing this package imports none of scikit-learn, diffusers, matplotlib and rich: the functions that need
them do (`pip install "fastflow[demo]"`).
"""
