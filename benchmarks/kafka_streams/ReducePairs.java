// The same decisions on Kafka Streams, for `engine.py`: known? -> count in the cell -> quota -> kept. The processor works on the
// input's partitions, with two persistent stores (RocksDB, with their changelogs), exactly once, a commit every second; a kept
// pair is passed on as it came. The cluster of a pair stands in its record.
//
//     java -cp ... ReducePairs BOOTSTRAP TOPIC GROUP KEPT STATE_DIR SEED

import java.lang.management.ManagementFactory;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.atomic.AtomicBoolean;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.clients.producer.ProducerConfig;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.Stores;
import org.bouncycastle.crypto.digests.SHAKEDigest;

public final class ReducePairs {
    private static final int Q = 4; // keeps one of four: the quota of engine.py
    private static final int HEADER_BYTES = 10; // Avro's single-object encoding
    private static final AtomicBoolean BEGUN = new AtomicBoolean();

    /** What is needed of a RawPair: Avro's binary encoding, the fields in the order of RawPair.avsc. */
    private static final class RawPair {
        private final byte[] data;
        private int at = HEADER_BYTES;
        final String id;
        int cluster = -1;

        RawPair(byte[] data) {
            this.data = data;
            id = text();
            skip(); // caption
            if (number() == 1) skip(); // image
            if (number() == 1) skip(); // image_uri
            for (long count = number(); count != 0; count = number()) {
                for (long n = 0; n < count; n++) {
                    if (text().equals("cluster")) cluster = Integer.parseInt(text());
                    else skip();
                }
            }
        }

        private long number() {
            long bits = 0;
            for (int shift = 0; ; shift += 7) {
                byte next = data[at++];
                bits |= (long) (next & 127) << shift;
                if (next >= 0) return bits >>> 1 ^ -(bits & 1);
            }
        }

        private void skip() {
            long size = number();
            at += (int) size;
        }

        private String text() {
            int size = (int) number();
            at += size;
            return new String(data, at - size, size, StandardCharsets.UTF_8);
        }
    }

    /** Counts a pair in its cell unless its id is known, and passes on what the quota keeps. */
    private static final class Reducer implements Processor<Bytes, byte[], Bytes, byte[]> {
        private final long seed;
        private ProcessorContext<Bytes, byte[]> context;
        private KeyValueStore<String, byte[]> known;
        private KeyValueStore<Integer, Long> cells; // cluster -> pairs counted, times Q, plus the place that its block keeps

        Reducer(long seed) {
            this.seed = seed;
        }

        @Override
        public void init(ProcessorContext<Bytes, byte[]> context) {
            this.context = context;
            known = context.getStateStore("known");
            cells = context.getStateStore("cells");
        }

        @Override
        public void process(Record<Bytes, byte[]> record) {
            if (BEGUN.compareAndSet(false, true)) sayFirst();
            RawPair pair = new RawPair(record.value());
            if (known.putIfAbsent(pair.id, new byte[] {1}) != null) return;
            Long cell = cells.get(pair.cluster);
            long counted = cell == null ? 0 : cell / Q;
            long keeps = cell == null ? 0 : cell % Q;
            if (counted % Q == 0) keeps = keptPlace(pair.cluster, counted / Q);
            cells.put(pair.cluster, (counted + 1) * Q + keeps);
            if (counted % Q == keeps) context.forward(record);
        }

        /** state/quota.py: of the hashes of a block's places, eight bytes of SHAKE128 each, the smallest is kept. */
        private long keptPlace(int cluster, long block) {
            ByteBuffer name = ByteBuffer.allocate(28);
            name.putLong(seed).putInt(0).putInt(context.taskId().partition()).putInt(cluster).putLong(block);
            SHAKEDigest shake = new SHAKEDigest(128);
            shake.update(name.array(), 0, 28);
            byte[] hashes = new byte[8 * Q];
            shake.doFinal(hashes, 0, hashes.length);
            ByteBuffer numbers = ByteBuffer.wrap(hashes);
            int least = 0;
            for (int place = 1; place < Q; place++) {
                if (Long.compareUnsigned(numbers.getLong(8 * place), numbers.getLong(8 * least)) < 0) least = place;
            }
            return least;
        }
    }

    private static void sayFirst() {
        long cpu = ((com.sun.management.OperatingSystemMXBean) ManagementFactory.getOperatingSystemMXBean()).getProcessCpuTime();
        System.out.println("first " + System.currentTimeMillis() / 1e3 + " " + cpu / 1e9);
        System.out.flush();
    }

    public static void main(String[] given) throws InterruptedException {
        String topic = given[1];
        long seed = Long.parseLong(given[5]);
        Properties settings = new Properties();
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, given[0]);
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, given[2]);
        settings.put(StreamsConfig.STATE_DIR_CONFIG, given[4]);
        settings.put(StreamsConfig.PROCESSING_GUARANTEE_CONFIG, StreamsConfig.EXACTLY_ONCE_V2);
        settings.put(StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, 1000);
        settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, 2);
        settings.put(StreamsConfig.consumerPrefix(ConsumerConfig.AUTO_OFFSET_RESET_CONFIG), "earliest");
        // A record of 30 KB does not fit into Java's default of 16 KB.
        settings.put(StreamsConfig.producerPrefix(ProducerConfig.BATCH_SIZE_CONFIG), 1 << 20);
        settings.put(StreamsConfig.producerPrefix(ProducerConfig.COMPRESSION_TYPE_CONFIG), "lz4");

        Topology topology = new Topology();
        topology.addSource("raw", Serdes.Bytes().deserializer(), Serdes.ByteArray().deserializer(), topic);
        topology.addProcessor("reduce", () -> new Reducer(seed), "raw");
        topology.addStateStore(
            Stores.keyValueStoreBuilder(Stores.persistentKeyValueStore("known"), Serdes.String(), Serdes.ByteArray())
                .withCachingEnabled(), "reduce");
        topology.addStateStore(
            Stores.keyValueStoreBuilder(Stores.persistentKeyValueStore("cells"), Serdes.Integer(), Serdes.Long())
                .withCachingEnabled(), "reduce");
        topology.addSink("kept", given[3], Serdes.Bytes().serializer(), Serdes.ByteArray().serializer(), "reduce");
        KafkaStreams streams = new KafkaStreams(topology, settings);
        CountDownLatch told = new CountDownLatch(1);
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            streams.close();
            told.countDown();
        }));
        streams.start();
        told.await();
    }
}
