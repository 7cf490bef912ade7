"""What tests know of the real data in ../shared."""

COUNTS = {  # PAPER Table 4, for the splits of the public files
    'BoolQ': {'validation': 3270},
    'CB': {'train': 250, 'validation': 56, 'test': 250},
    'COPA': {'train': 400, 'validation': 100, 'test': 500},
    'MultiRC': {'train': 27243, 'validation': 4848},
    'RTE': {'train': 2490, 'validation': 277, 'test': 3000},
    'WiC': {'train': 5428, 'validation': 638, 'test': 1400},
    'WSC': {'train': 554, 'validation': 104, 'test': 146},
}
CREAK = """
name: creak
prompt: |-
  Claim: {sentence}
  Is the claim true or false?
id: ex_id
labels: [{value: 'false', answer: 'False'}, {value: 'true', answer: 'True'}]
rationale: explanation
"""
