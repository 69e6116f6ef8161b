"""What notebook 06 finds, invented and small: two organisms, five treatments."""

from drawing import share

ATTACKS = ("sentiment-word", "instructions-prefix")


def result(asr, cacc):
    return {"asr": share(asr), "near_miss": share(0.2), "clean_firing": share(0.1), "cacc": share(cacc)}


FOUND = {
    attack: {
        "untreated": result(1.0, 0.9),
        "alignment": result(0.4, 0.8),
        "fine-tuning": result(0.7, 0.95),
        "random heads 1": result(0.6, 0.7),
        "random heads 2": result(0.8, 0.7),
    }
    for attack in ATTACKS
}
OF = {
    "random heads 1": "random heads",
    "random heads 2": "random heads",
    "untreated": "untreated",
    "alignment": "ASA, our reading",
    "fine-tuning": "rival",
}
