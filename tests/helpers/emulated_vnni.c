/* Computes the instruction VPDPBUSD of AVX-VNNI, 256 bits wide, on processors that lack it: a handler of SIGILL decodes
   it (VEX.256.66.0F38.W0 50 /r) and does what Intel's manual (volume 2, VPDPBUSD) says. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

static long computed;

static const int REGISTERS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

/* the two halves of a register of 256 bits, where the kernel has saved them (Intel's manual, volume 1, 13.4) */
static uint8_t *half(ucontext_t *context, int number, int high) {
    uint8_t *area = (uint8_t *)context->uc_mcontext.fpregs;
    return area + (high ? 576 : 160) + 16 * number;
}

static void handle(int signal_number, siginfo_t *info, void *given) {
    ucontext_t *context = given;
    greg_t *registers = context->uc_mcontext.gregs;
    uint8_t *code = (uint8_t *)registers[REG_RIP];
    if (code[0] != 0xC4 || (code[1] & 31) != 2 || (code[2] & 0x87) != 0x05 || code[3] != 0x50) {
        signal(signal_number, SIG_DFL);
        return; /* another instruction: it is tried again, and ends the process */
    }
    int r = !(code[1] & 0x80) << 3, x = !(code[1] & 0x40) << 3, b = !(code[1] & 0x20) << 3;
    int target = (code[4] >> 3 & 7) | r, first = ~code[2] >> 3 & 15, mode = code[4] >> 6, last = code[4] & 7;
    uint8_t a[32], n[32], *next = code + 5;
    memcpy(a, half(context, first, 0), 16);
    memcpy(a + 16, half(context, first, 1), 16);
    if (mode == 3) {
        memcpy(n, half(context, last | b, 0), 16);
        memcpy(n + 16, half(context, last | b, 1), 16);
    } else {
        int64_t address = 0;
        int32_t wide;
        int from_next = 0;
        if (last == 4) {
            uint8_t sib = *next++;
            int index = (sib >> 3 & 7) | x, base = sib & 7;
            if (index != 4)
                address += registers[REGISTERS[index]] << (sib >> 6);
            if (base == 5 && mode == 0) {
                memcpy(&wide, next, 4);
                address += wide;
                next += 4;
            } else
                address += registers[REGISTERS[base | b]];
        } else if (last == 5 && mode == 0) {
            memcpy(&wide, next, 4);
            address += wide;
            next += 4;
            from_next = 1;
        } else
            address += registers[REGISTERS[last | b]];
        if (mode == 1)
            address += (int8_t)*next++;
        if (mode == 2) {
            memcpy(&wide, next, 4);
            address += wide;
            next += 4;
        }
        if (from_next)
            address += (int64_t)next;
        memcpy(n, (void *)address, 32);
    }
    for (int i = 0; i < 8; i++) {
        uint8_t *place = half(context, target, i / 4) + 4 * (i % 4);
        int32_t sum;
        memcpy(&sum, place, 4);
        for (int k = 0; k < 4; k++)
            sum += (int32_t)a[4 * i + k] * (int8_t)n[4 * i + k];
        memcpy(place, &sum, 4);
    }
    uint64_t *in_use = (uint64_t *)((uint8_t *)context->uc_mcontext.fpregs + 512);
    *in_use |= 4; /* the upper halves are restored */
    registers[REG_RIP] = (greg_t)next;
    computed++;
}

void install(void) {
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGILL, &action, 0);
}

long emulated(void) { return computed; }
