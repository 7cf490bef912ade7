"""The slim classifier as MLflow loads and serves it.

This file travels with the logged model, as code and not as a pickle; besides MLflow the model needs
torch and transformers, and not this package.
"""

ARTIFACT = 'slim'
BATCH = 32  # texts to a forward pass


def _python_model():
    import pandas
    import torch
    from mlflow.pyfunc import PythonModel  # pyright: ignore
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    class SlimModel(PythonModel):
        """Texts in; a label and the probability of each label out."""

        def load_context(self, context):
            folder = context.artifacts[ARTIFACT]
            # The code in the folder is of the logged model, as is this file, which MLflow runs.
            model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
            self.model = model.eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

        @torch.inference_mode()
        def predict(self, context, model_input, params=None):  # pyright: ignore[reportIncompatibleMethodOverride]
            texts = list(model_input.iloc[:, 0]) if hasattr(model_input, 'iloc') else list(model_input)
            rows = [row for start in range(0, len(texts), BATCH) for row in self._rows(texts[start : start + BATCH])]
            labels = [self._label(row) for row in rows]
            return pandas.DataFrame({'label': labels, 'probabilities': rows})

        def _rows(self, texts):
            batch = self.tokenizer(texts, padding=True, return_tensors='pt')
            logits = self.model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits
            names = self.model.config.id2label
            probabilities = logits.float().sigmoid() if self._has_several() else logits.float().softmax(-1)
            return [{names[i]: p for i, p in enumerate(row)} for row in probabilities.tolist()]

        def _label(self, row):
            if self._has_several():
                return [name for name, probability in row.items() if probability >= 0.5]
            return max(row, key=row.__getitem__)

        def _has_several(self):
            return self.model.config.problem_type == 'multi_label_classification'

    return SlimModel()


if __name__ != 'dhrd_plugin.export.pyfunc':  # MLflow runs it; the package only names it
    import mlflow

    mlflow.models.set_model(_python_model())
