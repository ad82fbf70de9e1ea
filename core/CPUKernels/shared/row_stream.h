/* Rows that will be needed, to be fetched a few cache lines at a time while others are computed with. Processors fetch by themselves what
 * follows on a page, but not rows that lie pages apart, as they do with other heads between them. And of what is asked of them in long bursts
 * they drop most (Zen 3). */

/* Bytes of `channels` channels. */
INLINE int64_t row_bytes(cpu_precision precision, int64_t channels) {
    return precision == CPU_INT4 ? divide_up(channels, 2) : channels * element_bytes(precision);
}

/* Bytes from a row to the next. */
INLINE int64_t row_stride_bytes(const cpu_tensor* tensor) {
    return tensor->strides[2] * row_bytes(tensor->precision, 2) / 2;
}

/* Where a row begins in the tensor's memory. */
INLINE const char* row_in_memory(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t s) {
    return (const char*)tensor->data + row_offset(tensor, b, h, s) * row_bytes(tensor->precision, 2) / 2;
}

/* Whether so many rows leave so many cache sets unused between them that they need more than half the ways of the others, and are worth copying.
 * Such are those of heads side by side whose bytes together are a multiple of a high power of two. Processors with AVX-512 mostly have more
 * ways, and larger second-level caches that make up for it: copying only takes time (Zen 5: up to 40 % of decoding). */
static bool rows_conflict(const cpu_tensor* tensor, int64_t channels, int64_t rows) {
#if defined(KERNEL_AVX512)
    (void)tensor, (void)channels, (void)rows;
    return false;
#else
    enum { PAGE = 4096, WAYS = 8 }; /* of the first-level cache; what is PAGE apart shares a set */
    const int64_t stride = row_stride_bytes(tensor), apart = stride & -stride;
    return apart > row_bytes(tensor->precision, channels) && rows * minimum(apart, PAGE) / PAGE > WAYS / 2;
#endif
}

/* Rows that follow one another are one. Where they are many bytes, a line of each run of rows is fetched before the next of each: with several
 * pages open, memory is read up to 1.4 times as fast (Zen 3). */
typedef struct {
    const char *row, *line; /* of the first run: the row at hand, and the next line of it */
    int64_t stride, bytes;  /* from row to row; of a row */
    int64_t rows;           /* of a run, behind this one */
    int64_t run_stride;     /* from run to run; 0: there is one */
    int64_t lines_at_once;  /* of a run */
} row_stream;

/* Runs that rows are divided into, if they can be. */
#ifndef KERNEL_FETCH_RUNS
#define KERNEL_FETCH_RUNS 1
#endif
enum { RUNS = KERNEL_FETCH_RUNS, RUN_BYTES = 4096 };

/* Rows first ..< first + rows, to be fetched in `times` goes. */
static row_stream stream_rows(const cpu_tensor* tensor, int64_t b, int64_t h, int64_t channels, int64_t first, int64_t rows,
                              int64_t times) {
    row_stream stream = {0};
    if (rows <= 0 || tensor->strides[3] != 1) return stream;
    stream.row = row_in_memory(tensor, b, h, first);
    stream.line = line_of(stream.row);
    stream.bytes = row_bytes(tensor->precision, channels);
    stream.stride = row_stride_bytes(tensor);
    if (stream.stride == stream.bytes) {
        if (RUNS > 1 && rows % RUNS == 0 && rows / RUNS * stream.bytes >= RUN_BYTES) {
            rows /= RUNS;
            stream.run_stride = rows * stream.stride;
        }
        stream.bytes *= rows;
        rows = 1;
    }
    stream.rows = rows - 1;
    /* A long row is not worth more at once for the line that it begins within. */
    const int64_t before = rows > 1 ? stream.row - stream.line : 0;
    stream.lines_at_once = divide_up(rows * divide_up(before + stream.bytes, CACHE_LINE), times);
    return stream;
}

/* A line of each run. */
INLINE void fetch_line(const row_stream* stream, const char* line) {
    __builtin_prefetch(line);
    if (RUNS == 1 || stream->run_stride == 0) return;
    for (int run = 1; run < RUNS; run++) __builtin_prefetch(line + run * stream->run_stride);
}

/* Nothing of an empty stream. */
INLINE void fetch_lines(row_stream* stream) {
    const char* line = stream->line;
    if (!line) return;
    const char* end = stream->row + stream->bytes;
    const int64_t bytes = stream->lines_at_once * CACHE_LINE;
    if (end - line >= bytes) { /* of one row, or of rows that follow one another */
        stream->line = line + bytes;
#pragma clang loop unroll(disable)
        for (; line < stream->line; line += CACHE_LINE) fetch_line(stream, line);
        return;
    }
#pragma clang loop unroll(disable)
    for (int64_t left = stream->lines_at_once; left > 0; left--, line += CACHE_LINE) {
        if (line >= end) {
            if (stream->rows == 0) break;
            stream->rows--;
            stream->row += stream->stride;
            line = line_of(stream->row);
            end = stream->row + stream->bytes;
        }
        fetch_line(stream, line);
    }
    stream->line = line;
}

/* Streams that are fetched one after the other. */
typedef struct {
    row_stream now, next;
} row_queue;

INLINE void fetch_queue(row_queue* queue) {
    row_stream* now = &queue->now;
    fetch_lines(now);
    if (now->line >= now->row + now->bytes && now->rows == 0 && queue->next.line) {
        queue->now = queue->next;
        queue->next = (row_stream){0};
    }
}

/* What a forward kernel needs after the block of keys and values at hand: the next block, and where that is another item's, its queries. */
typedef struct {
    row_stream key, value, query;
} upcoming_rows;

INLINE void fetch_upcoming(upcoming_rows* upcoming) {
    fetch_lines(&upcoming->key);
    fetch_lines(&upcoming->value);
    fetch_lines(&upcoming->query);
}
