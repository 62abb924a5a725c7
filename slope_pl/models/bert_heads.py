"""BERT with its heads: pretraining, question answering, classification of sentences. Logits only, no losses."""

from typing import NamedTuple

from torch import Tensor, nn

from slope_pl.models.bert import ACTIVATIONS, BertConfig, BertModel, chain, initialise
from slope_pl.nn import built_whole


class PreTrainingOutput(NamedTuple):
    """``prediction_logits`` ``(B, T or P, vocab)``; ``seq_relationship_logits`` ``(B, 2)``: is next, is random."""

    prediction_logits: Tensor
    seq_relationship_logits: Tensor


class PreTrainingStates(NamedTuple):
    """The same with what :class:`slope_pl.models.BertModel` gives."""

    prediction_logits: Tensor
    seq_relationship_logits: Tensor
    hidden_states: tuple[Tensor, ...]
    pooler_output: Tensor


class QuestionAnsweringOutput(NamedTuple):
    """``start_logits`` and ``end_logits``, both ``(B, T)``; padding is not masked out of them."""

    start_logits: Tensor
    end_logits: Tensor


class QuestionAnsweringStates(NamedTuple):
    """The same with the hidden states of :class:`slope_pl.models.BertModel`."""

    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...]


class SequenceClassificationOutput(NamedTuple):
    """``logits`` ``(B, num_labels)``."""

    logits: Tensor


class SequenceClassificationStates(NamedTuple):
    """The same with the hidden states of :class:`slope_pl.models.BertModel`."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]


class BertLMPredictionHead(nn.Module):
    """Masked-word logits; the decoder's weight is the word embeddings, its bias also goes by the name ``bias``."""

    def __init__(self, config: BertConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.transform = chain(
            dense=nn.Linear(hidden, hidden),
            activation=ACTIVATIONS[config.hidden_act](),
            LayerNorm=nn.LayerNorm(hidden, eps=config.layer_norm_eps),
        )
        initialise(self, config)  # before the decoder: that one is the embeddings, whose row of [PAD] must stay zero
        # "meta": both tensors are replaced at once, allocating and filling them would be wasted.
        self.decoder = nn.Linear(hidden, config.vocab_size, device="meta")
        self.decoder.weight = word_embeddings.weight
        self.bias = self.decoder.bias = nn.Parameter(word_embeddings.weight.new_zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., hidden)`` to ``(..., vocab)``."""
        return self.decoder(self.transform(x))


class BertForPreTraining(nn.Module):
    """BERT with its two pretraining heads (Devlin et al. 2018, section 3.1)."""

    @built_whole()
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        next_sentence = nn.Linear(config.hidden_size, 2)
        initialise(next_sentence, config)
        words = self.bert.embeddings.word_embeddings
        predictions = BertLMPredictionHead(config, words)
        self.cls = nn.ModuleDict({"predictions": predictions, "seq_relationship": next_sentence})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        masked_positions: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> PreTrainingOutput | PreTrainingStates:
        """Return the logits of both heads; arguments and errors as :meth:`BertModel.forward`, and one more.

        ``masked_positions``, int64 ``(B, P)``, are the positions in ``0 .. T-1`` to predict (ValueError unless of that
        shape); fill short rows with any valid position and leave those out of the loss. Only these are decoded, which
        with P = 80 of T = 512 saves 84% of the largest activation. None decodes all ``T``.
        """
        out = self.bert(input_ids, attention_mask, token_type_ids, position_ids, output_hidden_states)
        x, pooled = out.last_hidden_state, out.pooler_output
        if masked_positions is not None:
            if masked_positions.ndim != 2 or masked_positions.shape[0] != x.shape[0]:
                shape = tuple(masked_positions.shape)
                raise ValueError(f"masked_positions has shape {shape}, expected (B, P) with B = {x.shape[0]}.")
            x = x.take_along_dim(masked_positions[..., None], dim=1)
        words, pairs = self.cls["predictions"](x), self.cls["seq_relationship"](pooled)
        if not output_hidden_states:
            return PreTrainingOutput(words, pairs)
        return PreTrainingStates(words, pairs, out.hidden_states, pooled)


class BertForQuestionAnswering(nn.Module):
    """BERT that points at the start and the end of the answer, without pooler (Devlin et al. 2018, section 4.2)."""

    @built_whole()
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        initialise(self.qa_outputs, config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> QuestionAnsweringOutput | QuestionAnsweringStates:
        """Return ``(B, T)`` start and end logits; arguments and errors as :meth:`BertModel.forward`."""
        out = self.bert(input_ids, attention_mask, token_type_ids, position_ids, output_hidden_states)
        start, end = self.qa_outputs(out.last_hidden_state).unbind(-1)
        if not output_hidden_states:
            return QuestionAnsweringOutput(start, end)
        return QuestionAnsweringStates(start, end, out.hidden_states)


class BertForSequenceClassification(nn.Module):
    """BERT that classifies a sentence or a pair (Devlin et al. 2018, section 4.1); 1 label to regress."""

    @built_whole()
    def __init__(self, config: BertConfig, num_labels: int) -> None:
        super().__init__()
        if num_labels < 1:
            raise ValueError(f"num_labels={num_labels}, expected at least 1: the classes of the task, or 1 to regress.")
        self.config = config
        self.num_labels = num_labels
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        initialise(self.classifier, config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> SequenceClassificationOutput | SequenceClassificationStates:
        """Return ``(B, num_labels)`` logits; arguments and errors as :meth:`BertModel.forward`."""
        out = self.bert(input_ids, attention_mask, token_type_ids, position_ids, output_hidden_states)
        logits = self.classifier(self.dropout(out.pooler_output))
        if not output_hidden_states:
            return SequenceClassificationOutput(logits)
        return SequenceClassificationStates(logits, out.hidden_states)
